//! NVRTC, one process per compilation: inside one process it compiles one program at a time.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::{env, fs, path::Path, process::Command, ptr};

use libloading::Library;

/// What NVRTC does not understand of the options; of those only the architecture is the user's.
const INVALID_OPTION: c_int = 5;

type Program = *mut c_void;
type Text = *const c_char;
type Create =
    unsafe extern "C" fn(*mut Program, Text, Text, c_int, *const Text, *const Text) -> c_int;
type Compile = unsafe extern "C" fn(Program, c_int, *const Text) -> c_int;
type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Bytes = unsafe extern "C" fn(Program, *mut u8) -> c_int;
type ErrorString = unsafe extern "C" fn(c_int) -> Text;

/// Compiles `source` to the file `cubin` in a process of its own. Gives the log, also as the error.
pub fn compile(
    library: &Path,
    source: &str,
    cubin: &Path,
    options: &[String],
) -> Result<String, String> {
    let output = env::current_exe()
        .and_then(|myself| {
            let mut command = Command::new(myself);
            command.arg(library).arg(source).arg(cubin).args(options).output()
        })
        .map_err(|error| format!("cannot run the compiler: {error}"))?;
    let log = String::from_utf8_lossy(&output.stdout).trim().to_string();
    if output.status.success() {
        return Ok(log);
    }
    // A crash says nothing but its status.
    let errors = String::from_utf8_lossy(&output.stderr);
    Err(format!("{}\n{}", output.status, format!("{log}\n{errors}").trim()))
}

/// The other process: library, source, cubin, options. Prints the log.
pub fn worker(arguments: &[String]) -> Result<(), String> {
    let [library, source, cubin, options @ ..] = arguments else {
        return Err(format!("unexpected arguments: {arguments:?}"));
    };
    let c_string = |text: &str| CString::new(text).map_err(|_| format!("{source}: NUL byte"));
    let text =
        c_string(&fs::read_to_string(source).map_err(|error| format!("{source}: {error}"))?)?;
    let name = c_string(source)?;
    let options = options.iter().map(|text| c_string(text)).collect::<Result<Vec<_>, _>>()?;
    let options: Vec<Text> = options.iter().map(|option| option.as_ptr()).collect();

    let nvrtc = Nvrtc::load(library)?;
    let mut program = ptr::null_mut();
    // SAFETY: the texts are NUL-terminated and outlive the call; there are no headers.
    nvrtc.check(unsafe {
        let (text, name) = (text.as_ptr(), name.as_ptr());
        (nvrtc.create)(&mut program, text, name, 0, ptr::null(), ptr::null())
    })?;
    // SAFETY: the program was created; `options` are as many NUL-terminated texts.
    let code = unsafe { (nvrtc.compile)(program, options.len() as c_int, options.as_ptr()) };
    let log = nvrtc.bytes(program, nvrtc.log_size, nvrtc.log)?;
    println!("{}", String::from_utf8_lossy(&log).trim_end_matches('\0'));
    nvrtc.check(code)?;

    let image = nvrtc.bytes(program, nvrtc.cubin_size, nvrtc.cubin)?;
    fs::write(cubin, image).map_err(|error| format!("{cubin}: {error}"))
}

struct Nvrtc {
    create: Create,
    compile: Compile,
    log_size: Size,
    log: Bytes,
    cubin_size: Size,
    cubin: Bytes,
    error_string: ErrorString,
    /// The functions' code.
    _library: Library,
}

impl Nvrtc {
    fn load(path: &str) -> Result<Self, String> {
        let load = || {
            // SAFETY: libnvrtc's initialisers may run in any process; the functions have the types of nvrtc.h, and the
            // library stays loaded as long as they are kept.
            unsafe {
                let library = Library::new(path)?;
                Ok(Self {
                    create: *library.get(b"nvrtcCreateProgram")?,
                    compile: *library.get(b"nvrtcCompileProgram")?,
                    log_size: *library.get(b"nvrtcGetProgramLogSize")?,
                    log: *library.get(b"nvrtcGetProgramLog")?,
                    cubin_size: *library.get(b"nvrtcGetCUBINSize")?,
                    cubin: *library.get(b"nvrtcGetCUBIN")?,
                    error_string: *library.get(b"nvrtcGetErrorString")?,
                    _library: library,
                })
            }
        };
        load().map_err(|error: libloading::Error| error.to_string())
    }

    fn bytes(&self, program: Program, size: Size, get: Bytes) -> Result<Vec<u8>, String> {
        let mut count = 0;
        // SAFETY: the program was created.
        self.check(unsafe { size(program, &mut count) })?;
        let mut bytes = vec![0; count];
        // SAFETY: there is room for as many bytes as NVRTC said.
        self.check(unsafe { get(program, bytes.as_mut_ptr()) })?;
        Ok(bytes)
    }

    fn check(&self, code: c_int) -> Result<(), String> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: NVRTC gives a static text for any code.
        let message = unsafe { CStr::from_ptr((self.error_string)(code)) }.to_string_lossy();
        let hint = match code {
            INVALID_OPTION => ": does OXISCAN_CUDA_ARCHS name an architecture that it lacks?",
            _ => "",
        };
        Err(format!("{message}{hint}"))
    }
}
