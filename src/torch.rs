//! What this crate knows of torch: its dtypes, its tensors' attributes, its thread count.

use std::panic::{AssertUnwindSafe, catch_unwind};

use pyo3::exceptions::PyRuntimeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyTuple, PyType};

use crate::dlpack::Reader;
use crate::error::{Error, Result};
use crate::tensor::{DType, Device, MAX_DIMS, TensorArg};

struct Torch {
    tensor: Py<PyType>,
    parameter: Py<PyAny>,
    reader: Option<Reader>,
    get_num_threads: Py<PyAny>,
    /// Where `reader` does not say it.
    #[cfg(feature = "cuda")]
    current_stream: Py<PyAny>,
    /// torch's dtype objects are singletons: comparing identity is enough, and cheap.
    dtypes: Vec<(Py<PyAny>, DType)>,
}

static TORCH: PyOnceLock<Torch> = PyOnceLock::new();

impl Torch {
    fn get(py: Python<'_>) -> PyResult<&Torch> {
        TORCH.get_or_try_init(py, || {
            let torch = py.import("torch")?;
            let dtypes = DType::FLOATS
                .iter()
                .chain(&DType::INTEGERS)
                .map(|dtype| Ok((torch.getattr(dtype.name())?.unbind(), *dtype)))
                .collect::<PyResult<_>>()?;
            let tensor = torch.getattr("Tensor")?.cast_into::<PyType>()?;
            Ok(Torch {
                reader: Reader::of(&tensor),
                tensor: tensor.unbind(),
                parameter: torch.getattr("nn")?.getattr("Parameter")?.unbind(),
                #[cfg(feature = "cuda")]
                current_stream: current_stream(py, &torch)?,
                get_num_threads: torch.getattr("get_num_threads")?.unbind(),
                dtypes,
            })
        })
    }
}

/// torch's function from the index of a CUDA device to its current stream; a torch without CUDA has no such tensor either.
#[cfg(feature = "cuda")]
fn current_stream(py: Python<'_>, torch: &Bound<'_, PyModule>) -> PyResult<Py<PyAny>> {
    let functions = torch.getattr("_C")?;
    Ok(functions.getattr("_cuda_getCurrentRawStream").map_or_else(|_| py.None(), Bound::unbind))
}

impl<'py> FromPyObject<'_, 'py> for TensorArg {
    type Error = PyErr;

    /// What is not a tensor we can take is refused where the argument's name is known: by `TensorArg::view` and its kin.
    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let mut arg = TensorArg::nothing();
        if read_at_once(object, &mut arg)? {
            return Ok(arg);
        }
        match TensorArg::read(object) {
            // Sparse and nested tensors and those of a vmap refuse to say where their memory is.
            Err(error) if error.is_instance_of::<PyRuntimeError>(object.py()) => {
                TensorArg::without_memory(object)
            }
            outcome => outcome,
        }
    }
}

/// Whether it is a lazily negated view. That shares its base's memory: reading it would lose the sign.
fn is_neg(tensor: &Bound<'_, PyAny>) -> PyResult<bool> {
    tensor.call_method0(intern!(tensor.py(), "is_neg"))?.is_truthy()
}

/// Whether torch's table could read the tensor into `arg`.
fn read_at_once(object: Borrowed<'_, '_, PyAny>, arg: &mut TensorArg) -> PyResult<bool> {
    let torch = Torch::get(object.py())?;
    // A subclass's memory may be elsewhere, and the reader loses the sign of a lazily negated view.
    let own_type = object.get_type();
    Ok((own_type.is(&torch.tensor) || own_type.is(&torch.parameter))
        && torch.reader.is_some_and(|reader| reader.read(&object, arg))
        && (!arg.may_be_imaginary() || !is_neg(&object)?))
}

impl TensorArg {
    fn without_memory(object: Borrowed<'_, '_, PyAny>) -> PyResult<Self> {
        let got = format!("a {} without memory of its own", object.get_type().name()?);
        Ok(TensorArg::refused(got, "a plain torch.Tensor".into()))
    }

    fn read(object: Borrowed<'_, '_, PyAny>) -> PyResult<Self> {
        let py = object.py();
        let torch = Torch::get(py)?;
        if !object.is_instance(torch.tensor.bind(py))? {
            let got = object.get_type().name()?.to_string();
            return Ok(TensorArg::refused(got, "torch.Tensor".into()));
        }
        let dtype = object.getattr(intern!(py, "dtype"))?;
        let Some((_, dtype)) = torch.dtypes.iter().find(|(known, _)| known.is(&dtype)) else {
            let got = dtype.to_string().trim_start_matches("torch.").to_owned();
            let allowed = "float32, float64, bfloat16, float16; for indices int32, int64";
            return Ok(TensorArg::refused(got, allowed.into()));
        };
        let device = if object.getattr(intern!(py, "is_cpu"))?.is_truthy()? {
            Device::Cpu
        } else {
            let device = object.getattr(intern!(py, "device"))?;
            if object.getattr(intern!(py, "is_cuda"))?.is_truthy()? {
                Device::Cuda(device.getattr(intern!(py, "index"))?.extract()?)
            } else {
                Device::Other(device.str()?.to_string_lossy().into_owned())
            }
        };
        if is_neg(&object)? {
            let got = "a lazily negated view".into();
            return Ok(TensorArg::refused(got, "tensor.resolve_neg()".into()));
        }
        let shape = object.getattr(intern!(py, "shape"))?;
        let shape = shape.cast::<PyTuple>()?;
        let strides = object.call_method0(intern!(py, "stride"))?;
        let strides = strides.cast::<PyTuple>()?;
        let ndim = shape.len();
        if ndim > MAX_DIMS {
            let allowed = format!("at most {MAX_DIMS}");
            return Ok(TensorArg::refused(format!("{ndim} dimensions"), allowed));
        }
        let data = object.call_method0(intern!(py, "data_ptr"))?.extract::<usize>()?;
        // DTensor, FakeTensor and other subclasses are tensors whose memory, if any, is elsewhere.
        let is_empty = object.call_method0(intern!(py, "numel"))?.extract::<usize>()? == 0;
        if !matches!(device, Device::Other(_)) && data == 0 && !is_empty {
            return TensorArg::without_memory(object);
        }
        if data % dtype.size() != 0 {
            let allowed = format!("data aligned to {} bytes", dtype.size());
            return Ok(TensorArg::refused(format!("data at {data:#x}"), allowed));
        }
        let mut arg = TensorArg::new(data as *mut u8, *dtype, device, ndim);
        for axis in 0..ndim {
            let size = shape.get_item(axis)?.extract()?;
            arg.set_axis(axis, size, strides.get_item(axis)?.extract()?);
        }
        Ok(arg)
    }
}

/// Where a call runs, and what it needs there of torch.
pub enum Backend {
    /// With as many threads as torch has.
    Cpu { threads: usize },
    /// On torch's current stream of the tensors' device.
    #[cfg(feature = "cuda")]
    Cuda(crate::cuda::launch::Stream),
}

impl Backend {
    /// The backend of a call, by the device of its first tensor.
    pub fn of(py: Python<'_>, arg: &'static str, tensor: &TensorArg) -> PyResult<Self> {
        match tensor.device {
            Device::Cpu => Ok(Backend::Cpu { threads: threads(py)? }),
            #[cfg(feature = "cuda")]
            Device::Cuda(index) => {
                let torch = Torch::get(py)?;
                let raw = match torch.reader.and_then(|reader| reader.current_stream(index)) {
                    Some(raw) => raw,
                    None => torch.current_stream.bind(py).call1((index,))?.extract()?,
                };
                Ok(Backend::Cuda(crate::cuda::launch::Stream::new(index, raw)?))
            }
            #[cfg(not(feature = "cuda"))]
            Device::Cuda(_) => {
                Err(no_backend(arg, tensor, "cpu, the only backend of this build").into())
            }
            Device::Other(_) => Err(no_backend(arg, tensor, "cpu, cuda").into()),
        }
    }
}

fn threads(py: Python<'_>) -> PyResult<usize> {
    Torch::get(py)?.get_num_threads.bind(py).call0()?.extract()
}

fn no_backend(arg: &'static str, tensor: &TensorArg, allowed: impl Into<String>) -> Error {
    let got = format!("a tensor on {}", tensor.device);
    Error::Unsupported { arg, got, allowed: allowed.into() }
}

/// Run an op on the device of its first tensor, `arg`: without the GIL, a panic turned into an exception.
///
/// The caller's tensors outlive this call: Python holds them as arguments of the function that calls it.
pub fn run<F>(py: Python<'_>, arg: &'static str, first: &TensorArg, op: F) -> PyResult<()>
where
    F: FnOnce(Backend) -> Result<()> + Send,
{
    let backend = Backend::of(py, arg, first)?;
    detached(py, || op(backend))
}

/// `run` of an op that has no other backend than the CPU, with its number of threads.
pub fn run_on_cpu<F>(
    py: Python<'_>,
    name: &str,
    arg: &'static str,
    first: &TensorArg,
    op: F,
) -> PyResult<()>
where
    F: FnOnce(usize) -> Result<()> + Send,
{
    if first.device != Device::Cpu {
        let allowed = format!("cpu, the only backend of {name} so far");
        return Err(no_backend(arg, first, allowed).into());
    }
    let threads = threads(py)?;
    detached(py, || op(threads))
}

fn detached(py: Python<'_>, op: impl FnOnce() -> Result<()> + Send) -> PyResult<()> {
    let outcome = py.detach(|| catch_unwind(AssertUnwindSafe(op)));
    outcome.unwrap_or_else(|panic| Err(Error::Internal(panic_message(&*panic))))?;
    Ok(())
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    if let Some(text) = panic.downcast_ref::<&str>() {
        (*text).to_owned()
    } else if let Some(text) = panic.downcast_ref::<String>() {
        text.clone()
    } else {
        "a panic without a message".to_owned()
    }
}

/// Panic on purpose, in the calling thread or a worker: for the test that a panic reaches Python as an exception.
#[pyfunction]
#[pyo3(name = "_panic", signature = (message, worker = false))]
pub fn panic_on_purpose(py: Python<'_>, message: String, worker: bool) -> PyResult<()> {
    let threads = threads(py)?;
    detached(py, || {
        if worker {
            return crate::cpu::pool::install(threads, || panic!("{message}"));
        }
        panic!("{message}")
    })
}
