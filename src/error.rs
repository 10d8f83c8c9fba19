//! One error type for the whole crate, and its one translation to Python exceptions.

use pyo3::PyErr;
use pyo3::exceptions::{PyNotImplementedError, PyRuntimeError, PyTypeError, PyValueError};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A shape, stride, device or number that the op cannot take.
    #[error("{arg}: got {got}; allowed: {allowed}")]
    Value { arg: &'static str, got: String, allowed: String },
    /// A dtype that the op cannot take.
    #[error("{arg}: got {got}; allowed: {allowed}")]
    Type { arg: &'static str, got: String, allowed: String },
    /// Something the op will take once it is written.
    #[error("{arg}: got {got}; allowed: {allowed}")]
    Unsupported { arg: &'static str, got: String, allowed: String },
    /// What the CUDA driver refused or lacks, and what to do about it.
    #[cfg(feature = "cuda")]
    #[error("cuda: {0}")]
    Cuda(String),
    /// A bug in this crate: a panic caught at the boundary.
    #[error("internal error, please report it: {0}")]
    Internal(String),
}

pub type Result<T> = std::result::Result<T, Error>;

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error {
            Error::Value { .. } => PyValueError::new_err(message),
            Error::Type { .. } => PyTypeError::new_err(message),
            Error::Unsupported { .. } => PyNotImplementedError::new_err(message),
            #[cfg(feature = "cuda")]
            Error::Cuda(_) => PyRuntimeError::new_err(message),
            Error::Internal(_) => PyRuntimeError::new_err(message),
        }
    }
}
