//! Compiles what changed of the kernels and writes OUT_DIR/cubins.rs, the table of all cubins.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Instant;
use std::{env, fs, thread};

use crate::instances::{Instance, instances};
use crate::nvrtc;
use crate::wheels::Wheels;

/// 8.6 and 8.9 run what is for 8.0; the f targets serve their whole family.
const ARCHS: &str = "sm_80,sm_90a,sm_100f,sm_120f";

const INCLUDE: &str = "cuda/include";

const OPTIONS: [&str; 5] = [
    "--std=c++17",
    "--ptxas-options=-v",
    // Functions of CCCL without __device__ are for the device too.
    "-default-device",
    // Deprecated declarations within the headers.
    "-diag-suppress=1444",
    "-Icuda/include",
];

/// One instance for one architecture.
struct Job<'a> {
    instance: &'a Instance,
    arch: &'a str,
    cubin: PathBuf,
    /// Says whether the cubin is still that of the key below.
    facts: PathBuf,
    key: u64,
}

/// What is kept beside a cubin.
struct Facts {
    compile_ms: u32,
    registers: u32,
    shared_bytes: u32,
}

pub fn build(wheels: &Wheels) -> Result<(), String> {
    let start = Instant::now();
    let out = PathBuf::from(env::var("OUT_DIR").unwrap());
    let folder = out.join("cubins");
    fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let archs = archs();
    let instances = instances();

    let mut sources = BTreeMap::new();
    for instance in &instances {
        sources.entry(instance.kernel).or_insert_with(|| source_hash(instance.kernel));
    }
    let archs_of = |instance: &Instance| {
        let only = instance.only;
        archs.iter().filter(move |arch| only.is_none_or(|only| only == arch.as_str()))
    };
    let job = |instance, arch| Job::new(instance, arch, &folder, wheels, &sources);
    let jobs: Vec<Vec<Job>> =
        instances.iter().map(|i| archs_of(i).map(|arch| job(i, arch)).collect()).collect();
    let stale: Vec<&Job> = jobs.iter().flatten().filter(|job| job.kept().is_none()).collect();
    if !stale.is_empty() {
        let summary = format!(
            "compiled {} of {} kernels for {}",
            stale.len(),
            jobs.iter().flatten().count(),
            archs.join(", ")
        );
        compile_all(stale, wheels)?;
        println!("cargo::warning={summary} in {:.0} s", start.elapsed().as_secs_f32());
    }

    let mut table = format!("pub static INSTANCES: [Embedded; {}] = [\n", instances.len());
    for (instance, jobs) in instances.iter().zip(&jobs) {
        writeln!(table, "    Embedded {{ symbol: {:?}, cubins: &[", instance.symbol).unwrap();
        for job in jobs {
            let facts = job.kept().ok_or_else(|| format!("{}: lost", job.facts.display()))?;
            writeln!(
                table,
                "        Cubin {{ arch: {:?}, image: include_bytes!({:?}), registers: {}, shared_bytes: {}, \
                 compile_ms: {} }},",
                job.arch, job.cubin, facts.registers, facts.shared_bytes, facts.compile_ms
            )
            .unwrap();
        }
        table += "    ] },\n";
    }
    table += "];\n";
    fs::write(out.join("cubins.rs"), table).map_err(|error| format!("OUT_DIR/cubins.rs: {error}"))
}

/// OXISCAN_CUDA_ARCHS: names with or without sm_, separated by commas; `none` for no cubins at all, as a linter needs.
/// The newest last.
fn archs() -> Vec<String> {
    println!("cargo::rerun-if-env-changed=OXISCAN_CUDA_ARCHS");
    let given = env::var("OXISCAN_CUDA_ARCHS").ok().filter(|value| !value.trim().is_empty());
    let given = given.as_deref().unwrap_or(ARCHS);
    let names = given.split(',').map(|name| name.trim().trim_start_matches("sm_"));
    let mut names: Vec<_> = names.filter(|name| !name.is_empty() && *name != "none").collect();
    // Numbers of two digits before those of three.
    names.sort_by_key(|name| (name.trim_end_matches(char::is_alphabetic).len(), *name));
    names.dedup();
    names.iter().map(|name| format!("sm_{name}")).collect()
}

/// As many at a time as cargo would run compilers, until one fails.
fn compile_all(mut jobs: Vec<&Job>, wheels: &Wheels) -> Result<(), String> {
    let at_once = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1);
    jobs.reverse();
    let jobs = Mutex::new(jobs);
    let next = || jobs.lock().unwrap().pop();
    let work = || {
        while let Some(job) = next() {
            if let Err(message) = job.compile(wheels) {
                jobs.lock().unwrap().clear();
                return Err(format!("{} for {}: {message}", job.instance.symbol, job.arch));
            }
        }
        Ok(())
    };
    eprintln!(
        "{:48} {:8} {:>7} {:>9} {:>7} {:>7} {:>7}",
        "kernel", "arch", "ms", "registers", "shared", "spills", "bytes"
    );
    thread::scope(|scope| {
        let threads: Vec<_> = (0..at_once).map(|_| scope.spawn(work)).collect();
        let results = threads.into_iter().map(|thread| thread.join().unwrap());
        let failures: Vec<_> = results.filter_map(Result::err).collect();
        if failures.is_empty() { Ok(()) } else { Err(failures.join("\n\n")) }
    })
}

impl<'a> Job<'a> {
    fn new(
        instance: &'a Instance,
        arch: &'a str,
        folder: &Path,
        wheels: &Wheels,
        sources: &BTreeMap<&str, u64>,
    ) -> Self {
        let mut job = Self {
            instance,
            arch,
            cubin: folder.join(format!("{}.{arch}.cubin", instance.symbol)),
            facts: folder.join(format!("{}.{arch}.facts", instance.symbol)),
            key: 0,
        };
        // Not where the wheels are: under pip that is a new place each time.
        let mut hasher = DefaultHasher::new();
        (job.options(), &wheels.versions, sources[instance.kernel]).hash(&mut hasher);
        job.key = hasher.finish();
        job
    }

    /// All but the wheels' folders.
    fn options(&self) -> Vec<String> {
        let mut options: Vec<_> = OPTIONS.iter().map(|option| option.to_string()).collect();
        options.push(format!("--gpu-architecture={}", self.arch));
        options.push(format!("-DKERNEL={}", self.instance.symbol));
        for (axis, value) in &self.instance.defines {
            options.push(format!("-D{axis}={value}"));
        }
        options
    }

    /// The facts of the cubin that is there, if it is what would be compiled now.
    fn kept(&self) -> Option<Facts> {
        let text = fs::read_to_string(&self.facts).ok()?;
        let fields: Vec<u64> =
            text.split(' ').map(|field| field.parse().ok()).collect::<Option<_>>()?;
        let [key, compile_ms, registers, shared_bytes] = fields[..] else { return None };
        (key == self.key && self.cubin.exists()).then_some(Facts {
            compile_ms: compile_ms as u32,
            registers: registers as u32,
            shared_bytes: shared_bytes as u32,
        })
    }

    fn compile(&self, wheels: &Wheels) -> Result<(), String> {
        // Interrupted, it leaves no facts of another cubin.
        let _ = fs::remove_file(&self.facts);
        let mut options = self.options();
        options.extend(wheels.includes.iter().map(|folder| format!("-I{}", folder.display())));
        let start = Instant::now();
        let source = source(self.instance.kernel);
        let log = nvrtc::compile(&wheels.nvrtc, &source, &self.cubin, &options)?;
        let compile_ms = start.elapsed().as_millis();

        for line in log.lines().filter(|line| is_warning(line)) {
            println!("cargo::warning={} for {}: {line}", self.instance.symbol, self.arch);
        }
        let resources = Resources::parse(&log, &self.instance.symbol)
            .ok_or_else(|| format!("the log is not that of one kernel of this name:\n{log}"))?;
        let Resources { registers, shared_bytes, stack, spills } = resources;
        let bytes = fs::metadata(&self.cubin).map_or(0, |metadata| metadata.len());
        eprintln!(
            "{:48} {:8} {compile_ms:7} {registers:9} {shared_bytes:7} {spills:7} {bytes:7}",
            self.instance.symbol, self.arch
        );
        if stack + spills > 0 {
            return Err(format!(
                "unexpected local memory: {stack} bytes of stack frame, {spills} of spills"
            ));
        }
        let facts = format!("{} {compile_ms} {registers} {shared_bytes}", self.key);
        fs::write(&self.facts, facts).map_err(|error| format!("{}: {error}", self.facts.display()))
    }
}

/// The compiler's warnings, and what ptxas calls information though it costs as much.
fn is_warning(line: &str) -> bool {
    line.contains("warning ") || line.contains("Potential Performance Loss")
}

/// What ptxas says of a program with one kernel.
struct Resources {
    registers: u32,
    shared_bytes: u32,
    stack: u32,
    spills: u32,
}

impl Resources {
    /// None if the log is not about this kernel alone or says less than all.
    fn parse(log: &str, symbol: &str) -> Option<Self> {
        // Of functions that were not inlined there are lines of their own.
        let total = |unit: &str| {
            let numbers: Option<Vec<u32>> =
                log.match_indices(unit).map(|(end, _)| number_before(log, end)).collect();
            numbers.filter(|numbers| !numbers.is_empty()).map(|numbers| numbers.iter().sum())
        };
        let entries: Vec<_> =
            log.lines().filter(|line| line.contains("Compiling entry function")).collect();
        let [entry] = entries[..] else { return None };
        if !entry.contains(&format!("'{symbol}'")) {
            return None;
        }
        Some(Self {
            registers: total(" registers,")?,
            shared_bytes: if log.contains(" bytes smem") { total(" bytes smem")? } else { 0 },
            stack: total(" bytes stack frame")?,
            spills: total(" bytes spill stores")? + total(" bytes spill loads")?,
        })
    }
}

fn number_before(text: &str, end: usize) -> Option<u32> {
    text[..end].split_whitespace().next_back()?.parse().ok()
}

fn source(kernel: &str) -> String {
    format!("cuda/kernels/{kernel}.cu")
}

/// Of the kernel's file and all of ours that it includes.
fn source_hash(kernel: &str) -> u64 {
    let mut files = BTreeMap::new();
    read(Path::new(&source(kernel)), &mut files);
    let mut hasher = DefaultHasher::new();
    files.hash(&mut hasher);
    hasher.finish()
}

/// Adds a file and what it includes. What is not among ours belongs to the wheels, or NVRTC will say what is missing.
fn read(path: &Path, files: &mut BTreeMap<PathBuf, String>) {
    let Ok(text) = fs::read_to_string(path) else { return };
    if files.insert(path.into(), text.clone()).is_some() {
        return;
    }
    for line in text.lines() {
        let Some(included) = line.trim_start().strip_prefix('#') else { continue };
        let Some(included) = included.trim_start().strip_prefix("include") else { continue };
        let name = included.trim_start().trim_start_matches(['"', '<']);
        let name = name.split(['"', '>']).next().unwrap();
        read(&path.with_file_name(name), files);
        read(&Path::new(INCLUDE).join(name), files);
    }
}
