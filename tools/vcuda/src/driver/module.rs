//! Modules, their kernels and variables, and launches.

use std::sync::Arc;

use ptxvm::error::ErrorKind;
use ptxvm::{DevicePtr, Error, Launch, LoadedModule, Module};

use super::memory::{self, Block, Kind};
use super::{Context, handle};
use crate::code::{Code, say};
use crate::fatbin;
use crate::settings::Settings;
use crate::work::{Function, Work, demangled};

/// Dynamic and static shared memory that a block may have without asking for more.
pub(super) const SHARED_UNASKED: u32 = 48 << 10;
/// Bytes before the sections of a 64-bit ELF file.
pub const ELF_HEADER: usize = 64;

/// A module of a context.
pub(super) struct Loaded {
    pub(super) loaded: LoadedModule,
    decoded: Module,
    text: String,
    /// Constants whose address somebody has: name, address of the copy in global memory, bytes.
    pub(super) constants: Vec<(String, u64, usize)>,
    /// Variables whose address somebody has.
    variables: Vec<u64>,
}

/// Whether an entry point's text runs `griddepcontrol.wait` before it uses memory, other than its parameters, or leaves the
/// straight way; and has no load (`ld.global.nc`) that an assembler may move ahead of that.
fn waits(ptx: &str, entry: &str) -> bool {
    let body = ptx.split_once(&format!(".entry {entry}(")).and_then(|(_, rest)| rest.split_once('{'));
    let whole = body.and_then(|(_, body)| body.split("\n}").next());
    if whole.is_some_and(|body| body.contains("ld.global.nc")) {
        return false;
    }
    let early = |line: &str| {
        let words = line.split(|c: char| c.is_whitespace() || ";.".contains(c));
        let line = line.trim_start();
        // Neither does a parameter's load, nor a declaration.
        let uses = line.contains('[') && !line.starts_with('.') && !line.starts_with("ld.param");
        uses || words.into_iter().any(|word| ["bra", "brx", "call", "ret", "exit"].contains(&word))
    };
    let mut lines = body.map_or("", |(_, body)| body).lines();
    lines
        .find_map(|line| {
            if line.contains("griddepcontrol.wait") { Some(true) } else { early(line).then_some(false) }
        })
        .unwrap_or(false)
}

/// Where parameters of these bytes and alignments begin, one behind the other, and their bytes.
fn placed(params: &[(u32, u32)]) -> Vec<(u32, u32)> {
    let mut end = 0u32;
    let place = |(bytes, align): &(u32, u32)| {
        let at = end.checked_next_multiple_of((*align).max(1)).unwrap_or(u32::MAX);
        end = at.saturating_add(*bytes);
        (at, *bytes)
    };
    params.iter().map(place).collect()
}

/// Whether the text declares a variable of this name in managed memory.
fn is_managed(ptx: &str, name: &str) -> bool {
    let named = |line: &str| {
        let part = |c: char| !(c.is_alphanumeric() || c == '_' || c == '$');
        line.split('=').next().is_some_and(|before| before.split(part).any(|word| word == name))
    };
    ptx.lines().any(|line| line.contains(".attribute(.managed)") && named(line))
}

impl Context {
    /// The PTX of a cubin for this device. Machine code is nothing that a virtual GPU runs; what tests make in its place is
    /// a cubin's header with PTX behind it.
    pub fn opened<'a>(&self, header: &[u8; ELF_HEADER], rest: &'a str) -> Result<&'a str, Code> {
        // The second byte of e_flags.
        let made_for = i32::from(header[0x31]);
        let (major, minor) = self.settings.capability;
        let runs = made_for / 10 == major && made_for % 10 <= minor;
        if !runs || !rest.contains(".version ") {
            say(&format!("machine code for sm_{made_for} is refused"));
            return Err(Code::NO_BINARY_FOR_GPU);
        }
        Ok(rest)
    }

    /// The PTX of a fat binary for this device.
    pub fn opened_fat(&self, container: &[u8]) -> Result<String, Code> {
        fatbin::ptx(container, self.settings.capability).map(|(_, text)| text).map_err(|bad| {
            say(&bad.to_string());
            if matches!(bad, fatbin::Bad::Broken(_)) { Code::INVALID_IMAGE } else { Code::NO_BINARY_FOR_GPU }
        })
    }

    /// cuModuleLoadDataEx; the second of an error is what the compiler says.
    pub fn load(&mut self, text: &str) -> Result<u64, (Code, String)> {
        self.load_named("module", text)
    }

    /// The same, with a name that stands for the text in findings.
    pub fn load_named(&mut self, name: &str, text: &str) -> Result<u64, (Code, String)> {
        self.unsafe_call().map_err(|code| (code, String::new()))?;
        let directive =
            |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("").trim();
        let pair = |text: &str| {
            let (major, minor) = text.split_once('.')?;
            Some((major.parse::<i32>().ok()?, minor.parse::<i32>().ok()?))
        };
        let newest = self.settings.ptx();
        match pair(directive(".version")) {
            Some(version) if version > newest => {
                let told = format!(
                    "Unsupported .version {}.{}; current version is '{}.{}'",
                    version.0, version.1, newest.0, newest.1
                );
                return Err((Code::UNSUPPORTED_PTX_VERSION, told));
            }
            Some(_) => {}
            None => return Err((Code::INVALID_PTX, "Missing .version directive at start of file".into())),
        }
        let target: String =
            directive(".target").trim_start_matches("sm_").chars().take_while(char::is_ascii_digit).collect();
        let (major, minor) = self.settings.capability;
        if target.parse::<i32>().is_ok_and(|target| target > major * 10 + minor) {
            return Err((Code::NO_BINARY_FOR_GPU, format!("the text is for sm_{target}")));
        }
        let decoded = Module::load(name, text).map_err(|e| (Code::INVALID_PTX, e.to_string()))?;
        // A driver's compiler takes the whole text or none of it. What the machine does not support is for launches to say.
        let wrong: Vec<_> =
            decoded.refused().into_iter().filter(|f| f.kind != ErrorKind::Unsupported).collect();
        if !wrong.is_empty() {
            return Err((Code::INVALID_PTX, Error::Fault(wrong).to_string()));
        }
        let loaded = self.gpu.load(&decoded).map_err(|e| (Code::OUT_OF_MEMORY, e.to_string()))?;
        let name = handle();
        let (constants, variables) = (Vec::new(), Vec::new());
        self.modules.insert(name, Loaded { loaded, decoded, text: text.to_owned(), constants, variables });
        Ok(name)
    }

    /// cuModuleUnload: no work may need it.
    pub fn unload(&mut self, module: u64) -> Result<(), Code> {
        let needed = |work: &Work| matches!(work, Work::Launch(f, ..) if f.owner == module);
        if self.waits(&needed) {
            say("a module is unloaded while its kernels wait to run");
            return Err(Code::ILLEGAL_STATE);
        }
        let gone = self.modules.remove(&module).ok_or(Code::INVALID_HANDLE)?;
        self.functions.retain(|_, function| function.owner != module);
        gone.variables.into_iter().try_for_each(|at| {
            let block = self.memory.remove(&at).ok_or(Code::UNKNOWN)?;
            let freed = self.gpu.free(DevicePtr(at)).map_err(|_| Code::UNKNOWN);
            if block.kind == Kind::ManagedVariable {
                memory::unmap(at, block.bytes);
            }
            freed
        })
    }

    /// cuModuleGetFunction.
    pub fn function(&mut self, module: u64, name: &str) -> Result<u64, Code> {
        let Loaded { decoded, text, .. } = self.modules.get(&module).ok_or(Code::INVALID_HANDLE)?;
        let known = self.functions.iter().find(|(_, f)| f.owner == module && f.name == name);
        if let Some((function, _)) = known {
            return Ok(*function);
        }
        let params = decoded.params(name).ok_or(Code::NOT_FOUND)?;
        let function = Function {
            owner: module,
            name: name.to_owned(),
            params: placed(&params),
            shared: decoded.shared_bytes(name).unwrap_or(0),
            threads: decoded.max_threads(name).unwrap_or(1024),
            cluster: decoded.cluster(name).unwrap_or_default(),
            waits: waits(text, name),
        };
        let name = handle();
        self.functions.insert(name, Arc::new(function));
        Ok(name)
    }

    /// cuModuleGetGlobal: address and bytes. A constant's address is that of a copy in global memory, from which launches take
    /// it; a managed variable can be used by the host from now on.
    pub fn variable(&mut self, module: u64, name: &str) -> Result<(u64, usize), Code> {
        let known = self.modules.get_mut(&module).ok_or(Code::INVALID_HANDLE)?;
        if let Some((_, at, bytes)) = known.constants.iter().find(|(known, ..)| known == name) {
            return Ok((*at, *bytes));
        }
        let (at, bytes, kind) = match self.gpu.global(&known.loaded, name) {
            Some((DevicePtr(at), bytes)) if known.variables.contains(&at) => return Ok((at, bytes as usize)),
            Some((DevicePtr(at), bytes)) if is_managed(&known.text, name) => {
                (at, bytes, Kind::ManagedVariable)
            }
            Some((DevicePtr(at), bytes)) => (at, bytes, Kind::Variable),
            None => {
                let held = self.gpu.constant(&known.loaded, name).ok_or(Code::NOT_FOUND)?.to_vec();
                let made = self.gpu.alloc_named(held.len(), name).map_err(|_| Code::OUT_OF_MEMORY)?;
                self.gpu.write(made, &held).map_err(|_| Code::UNKNOWN)?;
                known.constants.push((name.to_owned(), made.0, held.len()));
                (made.0, held.len() as u64, Kind::Variable)
            }
        };
        if kind == Kind::ManagedVariable {
            let mut held = vec![0; bytes as usize];
            self.gpu.read(DevicePtr(at), &mut held).map_err(|_| Code::UNKNOWN)?;
            let Some(host) = memory::map(at, bytes) else {
                say(&format!(
                    "the host's addresses from {at:#x} on are taken, so that {name} cannot be shared"
                ));
                return Err(Code::OUT_OF_MEMORY);
            };
            // SAFETY: pages of ours, at least as large, until the variable is given back.
            unsafe { self.gpu.back(DevicePtr(at), host) }.map_err(|_| Code::UNKNOWN)?;
            self.gpu.write(DevicePtr(at), &held).map_err(|_| Code::UNKNOWN)?;
        }
        known.variables.push(at);
        self.memory.insert(at, Block { bytes, kind, flags: 1, id: handle() });
        Ok((at, bytes as usize))
    }

    fn known(&self, function: u64) -> Result<&Arc<Function>, Code> {
        self.functions.get(&function).ok_or(Code::INVALID_HANDLE)
    }

    fn dynamic(&self, function: u64) -> Result<(u32, u32), Code> {
        let shared = self.known(function)?.shared;
        let unasked = SHARED_UNASKED.saturating_sub(shared);
        Ok((shared, self.dynamic.get(&function).copied().unwrap_or(unasked)))
    }

    /// cuFuncGetName.
    pub fn function_name(&self, function: u64) -> Result<&str, Code> {
        Ok(&self.known(function)?.name)
    }

    /// cuFuncGetModule.
    pub fn function_module(&self, function: u64) -> Result<u64, Code> {
        Ok(self.known(function)?.owner)
    }

    /// cuFuncGetAttribute, by the driver's number.
    pub fn function_attribute(&self, function: u64, which: u32) -> Result<i32, Code> {
        let (shared, dynamic) = self.dynamic(function)?;
        let (major, minor) = self.settings.capability;
        match which {
            0 => Ok(self.known(function)?.threads as i32), // MAX_THREADS_PER_BLOCK
            1 => Ok(shared as i32),                        // SHARED_SIZE_BYTES
            // CONST_SIZE_BYTES, LOCAL_SIZE_BYTES, NUM_REGS: PTX runs as it is, and no register is assigned
            2..=4 => Ok(0),
            5 | 6 => Ok(major * 10 + minor), // PTX_VERSION, BINARY_VERSION
            7 | 15 => Ok(0),                 // CACHE_MODE_CA, CLUSTER_SCHEDULING_POLICY_PREFERENCE
            10 => Ok(i32::from(self.known(function)?.cluster.must_be_named())), // CLUSTER_SIZE_MUST_BE_SET
            11..=13 => {
                let required = self.known(function)?.cluster.required;
                Ok(required.map_or(0, |shape| shape[which as usize - 11] as i32)) // REQUIRED_CLUSTER_WIDTH, ...
            }
            14 => Ok(i32::from(self.large_clusters.contains(&function))), // NON_PORTABLE_CLUSTER_SIZE_ALLOWED
            8 => Ok(dynamic as i32),                                      // MAX_DYNAMIC_SHARED_SIZE_BYTES
            9 => Ok(-1), // PREFERRED_SHARED_MEMORY_CARVEOUT: the driver's choice
            _ => Err(Code::INVALID_VALUE),
        }
    }

    /// cuOccupancyMaxActiveBlocksPerMultiprocessor, by threads, shared memory and number of blocks: none of registers.
    pub fn occupancy(&self, function: u64, threads: i32, shared_bytes: usize) -> Result<i32, Code> {
        let (fixed, dynamic) = self.dynamic(function)?;
        let threads =
            u32::try_from(threads).ok().filter(|n| (1..=1024).contains(n)).ok_or(Code::INVALID_VALUE)?;
        let asked = u32::try_from(shared_bytes).map_err(|_| Code::INVALID_VALUE)?;
        if asked > dynamic || threads > self.known(function)?.threads {
            return Ok(0);
        }
        let (most_threads, shared, blocks) = self.settings.multiprocessor();
        // Warps are whole, and the driver has a kibibyte of each block's shared memory.
        let by_threads = most_threads / threads.next_multiple_of(32);
        let by_shared = shared / (fixed + asked + (1 << 10));
        Ok(by_threads.min(by_shared).min(blocks) as i32)
    }

    /// cuOccupancyAvailableDynamicSMemPerBlock.
    pub fn available_shared(&self, function: u64, blocks: i32, threads: i32) -> Result<usize, Code> {
        let (fixed, _) = self.dynamic(function)?;
        let (most_threads, shared, most_blocks) = self.settings.multiprocessor();
        let blocks = u32::try_from(blocks).ok().filter(|n| (1..=most_blocks).contains(n));
        let threads = u32::try_from(threads).ok().filter(|n| (1..=1024).contains(n));
        let (blocks, threads) = blocks.zip(threads).ok_or(Code::INVALID_VALUE)?;
        if blocks * threads.next_multiple_of(32) > most_threads {
            return Err(Code::INVALID_VALUE);
        }
        let left = (shared / blocks).saturating_sub((1 << 10) + fixed);
        Ok(left.min(self.settings.shared.saturating_sub(fixed)) as usize)
    }

    /// cuFuncSetAttribute, by the driver's number.
    pub fn set_function_attribute(&mut self, function: u64, which: u32, value: i32) -> Result<(), Code> {
        let (shared, _) = self.dynamic(function)?;
        match (which, u32::try_from(value)) {
            (8, Ok(value)) if u64::from(shared) + u64::from(value) <= u64::from(self.settings.shared) => {
                self.dynamic.insert(function, value);
                Ok(())
            }
            // PREFERRED_SHARED_MEMORY_CARVEOUT: a hint of how caches are cut, and there are none.
            (9, _) if (-1..=100).contains(&value) => Ok(()),
            (14, Ok(allowed @ 0..=1)) => {
                match allowed {
                    1 => _ = self.large_clusters.insert(function),
                    _ => _ = self.large_clusters.remove(&function),
                }
                Ok(())
            }
            (15, Ok(0..=2)) => Ok(()), // how clusters are placed: a hint
            (8 | 9 | 14 | 15, _) => Err(Code::INVALID_VALUE),
            _ => Err(Code::NOT_SUPPORTED),
        }
    }

    /// The most blocks of a cluster of a kernel.
    pub fn most_blocks_of_cluster(&self, function: u64) -> Result<u32, Code> {
        self.known(function)?;
        Ok(match self.large_clusters.contains(&function) {
            _ if self.settings.capability < (9, 0) => 1,
            true => 16,
            false => 8,
        })
    }

    /// cuOccupancyMaxActiveClusters: as many as the multiprocessors have room for.
    pub fn clusters_at_once(&self, function: u64, shape: &Launch) -> Result<i32, Code> {
        let blocks = self.checked_cluster(function, shape)?;
        let threads = shape.block.iter().fold(1u32, |all, n| all.saturating_mul(*n));
        let threads = i32::try_from(threads).map_err(|_| Code::INVALID_VALUE)?;
        let held = self.occupancy(function, threads, shape.shared_bytes as usize)?;
        Ok(held * self.settings.multiprocessors / blocks as i32)
    }

    /// The blocks of a launch's clusters, which the device and the kernel must allow.
    fn checked_cluster(&self, function: u64, shape: &Launch) -> Result<u32, Code> {
        let kernel = self.known(function)?;
        let named = || demangled(&kernel.name);
        let required = kernel.cluster.required;
        if let (Some(asked), Some(required)) = (shape.cluster, required)
            && asked != required
        {
            say(&format!("{}: clusters of {asked:?} blocks; the kernel has {required:?}", named()));
            return Err(Code::INVALID_VALUE);
        }
        let Some(cluster) = shape.cluster.or(required) else {
            if kernel.cluster.must_be_named() {
                say(&format!("{}: it runs in clusters, and the launch names no size of them", named()));
                return Err(Code::INVALID_VALUE);
            }
            return Ok(1);
        };
        let blocks = cluster.iter().fold(1u32, |all, n| all.saturating_mul(*n));
        let most = self.most_blocks_of_cluster(function)?;
        if blocks == 0 || blocks > most {
            let why = if self.settings.capability < (9, 0) { ": VCUDA_CAPABILITY=9.0 has them" } else { "" };
            say(&format!("{}: clusters of {cluster:?} blocks; the most is {most}{why}", named()));
            return Err(Code::INVALID_CLUSTER_SIZE);
        }
        let in_clusters = kernel.cluster.counted;
        if !in_clusters && shape.grid.iter().zip(cluster).any(|(n, of)| !n.is_multiple_of(of)) {
            say(&format!(
                "{}: a grid of {:?} blocks is no multiple of its clusters of {cluster:?}",
                named(),
                shape.grid
            ));
            return Err(Code::INVALID_VALUE);
        }
        Ok(blocks)
    }

    /// Where each of a kernel's parameters begins, and its bytes.
    pub fn params(&self, function: u64) -> Result<Vec<(u32, u32)>, Code> {
        Ok(self.known(function)?.params.clone())
    }

    /// cuLaunchKernel.
    pub fn launch(
        &mut self,
        function: u64,
        shape: Launch,
        args: Vec<Vec<u8>>,
        stream: u64,
    ) -> Result<(), Code> {
        let (_, dynamic) = self.dynamic(function)?;
        let kernel = Arc::clone(self.known(function)?);
        let threads: u64 = shape.block.iter().map(|n| u64::from(*n)).product();
        let most = [i32::MAX as u32, 65_535, 65_535];
        let grid = shape.grid.iter().zip(most).all(|(n, most)| (1..=most).contains(n));
        let named = || demangled(&kernel.name);
        if !grid || !(1..=1024).contains(&threads) || shape.block[2] > 64 {
            say(&format!("{}: no grid of {:?} blocks of {:?} threads", named(), shape.grid, shape.block));
            return Err(Code::INVALID_VALUE);
        }
        if threads > u64::from(kernel.threads) {
            say(&format!("{}: a block of {threads} threads; it allows {}", named(), kernel.threads));
            return Err(Code::INVALID_VALUE);
        }
        self.checked_cluster(function, &shape)?;
        if shape.shared_bytes > dynamic {
            let asked = shape.shared_bytes;
            say(&format!("{}: {asked} bytes of dynamic shared memory, {dynamic} are allowed", named()));
            return Err(Code::INVALID_VALUE);
        }
        if shape.cooperative {
            let blocks: u64 = shape.grid.iter().map(|n| u64::from(*n)).product();
            let held = self.occupancy(function, threads as i32, shape.shared_bytes as usize)?;
            let most = held as u64 * self.settings.multiprocessors as u64;
            if blocks > most {
                say(&format!("{}: {blocks} blocks of a cooperative launch; {most} run at once", named()));
                return Err(Code::COOPERATIVE_LAUNCH_TOO_LARGE);
            }
        }
        self.put(stream, Work::Launch(kernel, shape, args))?;
        if self.settings.blocking && !self.capturing(stream)? { self.drain_stream(stream) } else { Ok(()) }
    }

    /// A launch that may begin before the kernel ahead of it has ended: here it does not, so what would go wrong then is
    /// refused.
    pub fn may_begin_early(&mut self, function: u64, stream: u64) -> Result<(), Code> {
        let captured = self.capturing(stream)?;
        let kernel = self.known(function)?;
        let Settings { capability, version, .. } = self.settings;
        if capability < (9, 0) || version < (11, 8) || captured && version < (12, 3) {
            say(&format!("{}: no programmatic launch on {capability:?} with CUDA {version:?}", kernel.name));
            return Err(Code::NOT_SUPPORTED);
        }
        if !kernel.waits {
            say(&format!("{} may begin early, and uses memory before it waits", kernel.name));
            return Err(Code::ILLEGAL_STATE);
        }
        Ok(())
    }
}
