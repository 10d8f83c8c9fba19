//! Makes what the `cuda` feature embeds: a cubin for each instance of each kernel and architecture, and the Rust side of
//! cuda/include/params.h. Without the feature it makes nothing.

#[cfg(feature = "cuda")]
#[path = "../src/cuda/instances.rs"]
#[allow(dead_code)]
mod instances;
#[cfg(feature = "cuda")]
mod kernels;
#[cfg(feature = "cuda")]
mod nvrtc;
#[cfg(feature = "cuda")]
mod params;
#[cfg(feature = "cuda")]
mod wheels;

fn main() {
    #[cfg(feature = "cuda")]
    if let Err(message) = cuda() {
        eprintln!("{message}");
        std::process::exit(1);
    }
    #[cfg(not(feature = "cuda"))]
    println!("cargo::rerun-if-changed=build");
}

#[cfg(feature = "cuda")]
fn cuda() -> Result<(), String> {
    // Cargo calls it without arguments, `nvrtc::compile` with some.
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    if !arguments.is_empty() {
        return nvrtc::worker(&arguments);
    }

    // The versions of the wheels are written in pyproject.toml.
    for path in ["build", "cuda", "src/cuda/instances.rs", "pyproject.toml"] {
        println!("cargo::rerun-if-changed={path}");
    }
    let wheels = wheels::find()?;
    params::generate(&wheels)?;
    kernels::build(&wheels)
}
