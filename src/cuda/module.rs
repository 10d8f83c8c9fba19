//! The embedded cubins, devices, and kernels loaded on them.

use std::ffi::{CStr, CString, c_void};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use cudarc::driver::sys;

use super::instances;
use crate::error::{Error, Result};

/// An instance of a kernel, compiled for one architecture.
pub struct Cubin {
    pub arch: &'static str,
    pub image: &'static [u8],
    pub registers: u32,
    pub shared_bytes: u32,
    pub compile_ms: u32,
}

/// An instance of a kernel.
pub struct Embedded {
    pub symbol: &'static str,
    pub cubins: &'static [Cubin],
}

include!(concat!(env!("OUT_DIR"), "/cubins.rs"));

impl Embedded {
    /// The cubin for devices of this compute capability.
    pub fn cubin(&self, capability: (u32, u32)) -> Option<&'static Cubin> {
        // Of those that run, the last one listed is the newest architecture's.
        self.cubins.iter().rev().find(|cubin| instances::runs_on(cubin.arch, capability))
    }
}

/// torch counts devices in 8 bits.
const MAX_DEVICES: usize = 128;

/// A device that kernels run on.
pub struct CudaDevice {
    /// Torch's.
    pub index: usize,
    handle: sys::CUdevice,
    pub name: String,
    pub capability: (u32, u32),
    pub multiprocessors: u32,
    /// The most shared memory of a block.
    shared_bytes: usize,
    /// Whether a kernel may be launched to start before the one ahead of it ends (dependent_launch.cuh).
    pub starts_early: bool,
    /// The primary context, which torch uses too; kept for the life of the process.
    context: sys::CUcontext,
}

// SAFETY: a context is a handle that the driver lets any thread use.
unsafe impl Send for CudaDevice {}
// SAFETY: as above.
unsafe impl Sync for CudaDevice {}

/// Turn a driver's code into an error that says what was being done.
pub fn check(code: sys::CUresult, doing: &str) -> Result<()> {
    if code == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text: *const std::ffi::c_char = std::ptr::null();
    // SAFETY: `text` is a valid place for a pointer; the driver sets it to a string that is never freed, or to null.
    let text = unsafe {
        sys::cuGetErrorString(code, &mut text);
        if text.is_null() { c"no description".into() } else { CStr::from_ptr(text).to_owned() }
    };
    Err(Error::Cuda(format!("{doing}: {code:?}, {}", text.to_string_lossy())))
}

/// Whether there is a CUDA driver on this machine.
pub fn has_driver() -> bool {
    static PRESENT: OnceLock<bool> = OnceLock::new();
    // SAFETY: it loads the driver's library, whose initialisers are those that torch runs too.
    *PRESENT.get_or_init(|| unsafe { sys::is_culib_present() })
}

/// The CUDA version that the driver supports, 12090 for 12.9.
pub fn driver_version() -> Result<i32> {
    let mut version = 0;
    // SAFETY: `version` is a valid place for the result.
    check(unsafe { sys::cuDriverGetVersion(&mut version) }, "asking for the driver's version")?;
    Ok(version)
}

impl CudaDevice {
    /// The device with torch's index.
    pub fn get(index: usize) -> Result<&'static CudaDevice> {
        static DEVICES: [OnceLock<CudaDevice>; MAX_DEVICES] =
            [const { OnceLock::new() }; MAX_DEVICES];
        let Some(device) = DEVICES.get(index) else {
            return Err(Error::Cuda(format!("device {index}: at most {MAX_DEVICES} are known")));
        };
        if let Some(device) = device.get() {
            return Ok(device);
        }
        // Two threads may both get here: the second one's is dropped, and its hold on the context is one more of many.
        let opened = CudaDevice::open(index)?;
        Ok(device.get_or_init(|| opened))
    }

    fn open(index: usize) -> Result<CudaDevice> {
        if !has_driver() {
            return Err(Error::Cuda(
                "there is no CUDA driver on this machine (libcuda.so.1): install NVIDIA's driver, or use CPU tensors"
                    .into(),
            ));
        }
        let doing = format!("opening cuda:{index}");
        let mut device = 0;
        let mut context = null_mut();
        let mut name = [0; 256];
        let attribute = |attribute, device| {
            let mut value = 0;
            // SAFETY: `value` is a valid place for the result.
            let code = unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, device) };
            check(code, &doing).map(|()| value as u32)
        };
        use sys::CUdevice_attribute_enum as Attribute;
        // SAFETY: every pointer is to a local variable of the type that the driver fills, `name` with its length.
        unsafe {
            check(sys::cuInit(0), &doing)?;
            check(sys::cuDeviceGet(&mut device, index as i32), &doing)?;
            check(sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as i32, device), &doing)?;
            check(sys::cuDevicePrimaryCtxRetain(&mut context, device), &doing)?;
        }
        // SAFETY: the driver ended the name with a zero.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
        let capability = (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)?,
        );
        let multiprocessors =
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device)?;
        let shared_bytes =
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, device)?;
        // Capturing such launches in a graph takes CUDA 12.3.
        let starts_early = capability >= (9, 0) && driver_version()? >= 12030;
        Ok(CudaDevice {
            index,
            handle: device,
            name,
            capability,
            multiprocessors,
            shared_bytes: shared_bytes as usize,
            starts_early,
            context,
        })
    }

    /// Run `body` with this device's context current in this thread.
    pub fn enter<T>(&self, body: impl FnOnce() -> Result<T>) -> Result<T> {
        let mut current = null_mut();
        // SAFETY: `current` is a valid place for the result.
        check(unsafe { sys::cuCtxGetCurrent(&mut current) }, "asking for the current context")?;
        if current == self.context {
            return body();
        }
        if !current.is_null() {
            let mut handle = 0;
            // SAFETY: `handle` is a valid place for the result.
            check(unsafe { sys::cuCtxGetDevice(&mut handle) }, "asking for the context's device")?;
            if handle == self.handle {
                return Err(Error::Cuda(format!(
                    "cuda:{}: the current context is not the device's primary one (a green context?), and its streams \
                     take no kernels of this package: make the primary context current",
                    self.index
                )));
            }
        }
        // SAFETY: the context is retained for the life of the process.
        check(unsafe { sys::cuCtxPushCurrent_v2(self.context) }, "entering a context")?;
        let result = body();
        // SAFETY: `current` is a valid place for the context that was pushed above.
        check(unsafe { sys::cuCtxPopCurrent_v2(&mut current) }, "leaving a context")?;
        result
    }

    /// The instance as a function of this device, loaded on first use. To be called inside `enter`.
    pub fn function(&self, instance: usize) -> Result<sys::CUfunction> {
        static FUNCTIONS: [[AtomicPtr<sys::CUfunc_st>; instances::COUNT]; MAX_DEVICES] =
            [const { [const { AtomicPtr::new(null_mut()) }; instances::COUNT] }; MAX_DEVICES];
        static LOADING: Mutex<()> = Mutex::new(());
        let function = &FUNCTIONS[self.index][instance];
        let known = function.load(Ordering::Acquire);
        if !known.is_null() {
            return Ok(known);
        }
        let _loading = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
        let known = function.load(Ordering::Acquire);
        if !known.is_null() {
            return Ok(known);
        }
        let loaded = self.load(instance)?;
        function.store(loaded, Ordering::Release);
        Ok(loaded)
    }

    /// What a block of the instance may take of shared memory beside what the kernel declares with a size.
    pub fn shared_bytes_left(&self, instance: usize) -> usize {
        let own = INSTANCES[instance].cubin(self.capability).map_or(0, |cubin| cubin.shared_bytes);
        self.shared_bytes.saturating_sub(own as usize)
    }

    fn load(&self, instance: usize) -> Result<sys::CUfunction> {
        let embedded = &INSTANCES[instance];
        let (major, minor) = self.capability;
        let Some(cubin) = embedded.cubin(self.capability) else {
            let archs: Vec<_> = embedded.cubins.iter().map(|cubin| cubin.arch).collect();
            return Err(Error::Cuda(format!(
                "cuda:{} ({}) has compute capability {major}.{minor}; this build has kernels for {}. Build it from \
                 source with OXISCAN_CUDA_ARCHS=sm_{major}{minor}, or use CPU tensors",
                self.index,
                self.name,
                archs.join(", ")
            )));
        };
        let doing = format!("loading {} ({}) on cuda:{}", embedded.symbol, cubin.arch, self.index);
        let symbol = CString::new(embedded.symbol).expect("a symbol has no zero byte");
        let mut module = null_mut();
        let mut function = null_mut();
        // While a stream is being captured the driver refuses what may disturb the capture; loading does not, in this mode.
        let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the image is a whole cubin, made by the compiler; pointers are to local variables of the types that the
        // driver fills; the module is never unloaded, so the function stays valid. The mode is put back whatever happens.
        unsafe {
            check(sys::cuThreadExchangeStreamCaptureMode(&mut mode), &doing)?;
            let loaded = check(
                sys::cuModuleLoadData(&mut module, cubin.image.as_ptr().cast::<c_void>()),
                &doing,
            )
            .and_then(|()| {
                check(sys::cuModuleGetFunction(&mut function, module, symbol.as_ptr()), &doing)
            })
            .and_then(|()| {
                let most =
                    sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                let left = self.shared_bytes_left(instance) as i32;
                check(sys::cuFuncSetAttribute(function, most, left), &doing)
            });
            check(sys::cuThreadExchangeStreamCaptureMode(&mut mode), &doing)?;
            loaded?;
        }
        Ok(function)
    }
}
