//! Where the compilers are: NVRTC, its headers and libclang come from PyPI, so that no CUDA toolkit need be installed.

use std::{env, path::Path, path::PathBuf, process::Command};

/// Name, and what is wanted of it.
const WHEELS: [(&str, &str); 4] = [
    ("nvidia-cuda-nvrtc-cu12", "nvidia/cuda_nvrtc/lib/libnvrtc.so.12"),
    ("nvidia-cuda-runtime-cu12", "nvidia/cuda_runtime/include"),
    ("nvidia-cuda-cccl-cu12", "nvidia/cuda_cccl/include"),
    ("libclang", "clang/native/libclang.so"),
];

/// Where the versions are written.
const PYPROJECT: &str = include_str!("../pyproject.toml");

/// Prints version and place of each wheel, or fails with the reason in its last line.
const QUERY: &str = "
import importlib.metadata, os, sys
for name, path in zip(sys.argv[1::2], sys.argv[2::2]):
    wheel = importlib.metadata.distribution(name)
    place = os.path.abspath(wheel.locate_file(path))
    if not os.path.exists(place):
        sys.exit(f'{place} does not exist')
    print(wheel.version, place)
";

pub struct Wheels {
    pub nvrtc: PathBuf,
    /// Of the CUDA runtime and of CCCL.
    pub includes: [PathBuf; 2],
    pub libclang: PathBuf,
    /// Of all, in one text: other versions make other cubins.
    pub versions: String,
}

/// Asks each Python that may have them; .venv is the Makefile's. Under pip they come through PYTHONPATH, so any Python sees those.
pub fn find() -> Result<Wheels, String> {
    println!("cargo::rerun-if-env-changed=OXISCAN_BUILD_PYTHON");
    let variable = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let candidates = [
        ("OXISCAN_BUILD_PYTHON", variable("OXISCAN_BUILD_PYTHON")),
        ("PYO3_PYTHON", variable("PYO3_PYTHON")),
        ("VIRTUAL_ENV", variable("VIRTUAL_ENV").map(|folder| folder.join("bin/python"))),
        (".venv", Some(".venv/bin/python".into())),
        ("PATH", Some("python3".into())),
    ];
    let mut reasons = String::new();
    for (origin, python) in candidates {
        match python.as_deref().map(ask) {
            Some(Ok(wheels)) => {
                // A changed file has cargo run this again. Under pip its folder is gone after the build, which would be
                // a change each time.
                if variable("PYTHONPATH").is_none() {
                    println!("cargo::rerun-if-changed={}", wheels.nvrtc.display());
                }
                return Ok(wheels);
            }
            Some(Err(reason)) => reasons += &format!("  {origin}: {reason}\n"),
            None => reasons += &format!("  {origin}: not set\n"),
        }
    }
    let install: String =
        WHEELS.iter().map(|(name, _)| format!(" {}", requirement(name))).collect();
    Err(format!(
        "The CUDA kernels are compiled with packages from PyPI, which no Python has:\n{reasons}\n\
         Install them:\n  pip install{install}\n\
         and name that Python in OXISCAN_BUILD_PYTHON, or build for the CPU only: --no-default-features."
    ))
}

/// A wheel as pyproject.toml requires it.
fn requirement(name: &str) -> &'static str {
    let is_it = |text: &&str| text.split_once("==").is_some_and(|(required, _)| required == name);
    PYPROJECT.split('"').find(is_it).expect("pyproject.toml requires each wheel in one version")
}

fn ask(python: &Path) -> Result<Wheels, String> {
    let arguments = WHEELS.iter().flat_map(|(name, path)| [name, path]);
    let output = Command::new(python)
        .args(["-c", QUERY])
        .args(arguments)
        .output()
        .map_err(|error| format!("{}: {error}", python.display()))?;
    if !output.status.success() {
        let log = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{}: {}", python.display(), log.trim().lines().last().unwrap_or("")));
    }
    let answer = String::from_utf8_lossy(&output.stdout);
    let (versions, places): (Vec<_>, Vec<_>) =
        answer.lines().filter_map(|line| line.split_once(' ')).unzip();
    let [nvrtc, runtime, cccl, libclang] = places.as_slice() else {
        return Err(format!("{}: {answer}", python.display()));
    };
    Ok(Wheels {
        nvrtc: nvrtc.into(),
        includes: [runtime.into(), cccl.into()],
        libclang: libclang.into(),
        versions: versions.join(" "),
    })
}
