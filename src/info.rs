//! What `python -m oxiscan.info` shows of this build.

use pyo3::prelude::*;
use pyo3::types::PyDict;

#[cfg(feature = "cuda")]
use crate::cuda::{self, module::INSTANCES};

/// Version, backends, vector instructions, ops with CUDA kernels and the architectures these are compiled for, and of the
/// chunk scan: headdim and dstate that have kernels of their own, the largest of any.
#[pyfunction]
pub fn build_info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let info = PyDict::new(py);
    info.set_item("version", env!("CARGO_PKG_VERSION"))?;
    info.set_item("simd", crate::cpu::simd_name())?;
    info.set_item("profile", if cfg!(debug_assertions) { "debug" } else { "release" })?;
    #[cfg(feature = "cuda")]
    let (backends, ops, archs) = {
        let archs = INSTANCES[0].cubins.iter().map(|cubin| cubin.arch).collect();
        (vec!["cpu", "cuda"], cuda::OPS.to_vec(), archs)
    };
    #[cfg(not(feature = "cuda"))]
    let (backends, ops, archs) = (vec!["cpu"], vec![], vec![]);
    info.set_item("backends", backends)?;
    info.set_item::<_, Vec<&str>>("cuda_ops", ops)?;
    info.set_item::<_, Vec<&str>>("cuda_archs", archs)?;
    #[cfg(feature = "cuda")]
    let sizes = (cuda::ssd::HEADDIMS.to_vec(), cuda::ssd::DSTATES.to_vec(), cuda::ssd::MAX_SIZE);
    #[cfg(not(feature = "cuda"))]
    let sizes = (vec![], vec![], 0);
    info.set_item::<_, (Vec<usize>, Vec<usize>, usize)>("cuda_chunk_scan", sizes)?;
    Ok(info)
}

/// The CUDA version that the driver supports, (12, 9) for 12.9; None without a driver or a CUDA backend.
#[pyfunction]
#[pyo3(name = "_cuda_driver_version")]
pub fn cuda_driver_version() -> PyResult<Option<(i32, i32)>> {
    #[cfg(feature = "cuda")]
    if cuda::module::has_driver() {
        let version = cuda::module::driver_version()?;
        return Ok(Some((version / 1000, version % 1000 / 10)));
    }
    Ok(None)
}

/// The kernels that a device of this compute capability runs, a dict for each; none where the build has none for it.
#[pyfunction]
#[pyo3(name = "_cuda_kernels")]
#[cfg_attr(not(feature = "cuda"), expect(unused_variables))]
pub fn cuda_kernels(py: Python<'_>, major: u32, minor: u32) -> PyResult<Vec<Bound<'_, PyDict>>> {
    #[cfg(feature = "cuda")]
    let kernels = INSTANCES
        .iter()
        .filter_map(|embedded| Some((embedded.symbol, embedded.cubin((major, minor))?)))
        .map(|(symbol, cubin)| {
            let kernel = PyDict::new(py);
            kernel.set_item("symbol", symbol)?;
            kernel.set_item("arch", cubin.arch)?;
            kernel.set_item("registers", cubin.registers)?;
            kernel.set_item("shared_bytes", cubin.shared_bytes)?;
            kernel.set_item("cubin_bytes", cubin.image.len())?;
            kernel.set_item("compile_ms", cubin.compile_ms)?;
            Ok(kernel)
        })
        .collect();
    #[cfg(not(feature = "cuda"))]
    let kernels = Ok(Vec::new());
    kernels
}
