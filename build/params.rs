//! cuda/include/params.h in Rust: OUT_DIR/params.rs.

use std::{env, path::Path};

use crate::wheels::Wheels;

pub fn generate(wheels: &Wheels) -> Result<(), String> {
    // SAFETY: the build script has only this thread yet.
    unsafe { env::set_var("LIBCLANG_PATH", &wheels.libclang) };

    bindgen::Builder::default()
        .header("cuda/include/params.h")
        .allowlist_item("Oxi.*|OXI_.*")
        .derive_default(true)
        .layout_tests(true)
        .generate()
        .map_err(|error| format!("bindgen on cuda/include/params.h: {error}"))?
        .write_to_file(Path::new(&env::var("OUT_DIR").unwrap()).join("params.rs"))
        .map_err(|error| format!("OUT_DIR/params.rs: {error}"))
}
