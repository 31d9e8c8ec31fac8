//! Small kernels written in PTX: a body between a fixed head and tail.

use ptxvm::error::{ErrorKind, Finding};
use ptxvm::{Arg, DevicePtr, Error, Gpu, Launch, Module, Options, Report};

/// A device with one kernel. Its body finds the arguments in %rd1, %rd2, %rd3 (64 bits), the thread in %r1, the block
/// in %r2, 4096 bytes of shared memory `s`, 256 bytes of local memory `l`, and the constants `k` (bytes 0 to 63).
pub(crate) struct Kernel {
    pub(crate) gpu: Gpu,
    text: String,
}

impl Kernel {
    pub(crate) fn new(body: &str) -> Self {
        Self::with(body, Options::default())
    }

    pub(crate) fn with(body: &str, options: Options) -> Self {
        let bytes: Vec<String> = (0..64).map(|i| i.to_string()).collect();
        let text = format!(
            ".version 8.8\n.target sm_90\n.address_size 64\n.const .align 16 .b8 k[64] = {{{}}};\n\
             .visible .entry test(.param .u64 a, .param .u64 b, .param .u64 c)\n{{\n\
             .reg .pred %p<9>;\n.reg .b16 %h<20>;\n.reg .b32 %r<40>;\n.reg .b64 %rd<40>;\n.reg .b128 %q<4>;\n\
             .reg .f32 %f<20>;\n.reg .f64 %d<20>;\n.shared .align 16 .b8 s[4096];\n.local .align 16 .b8 l[256];\n\
             ld.param.u64 %rd1, [a];\nld.param.u64 %rd2, [b];\nld.param.u64 %rd3, [c];\n\
             mov.u32 %r1, %tid.x;\nmov.u32 %r2, %ctaid.x;\n{body}\nret;\n}}\n",
            bytes.join(", ")
        );
        Self { gpu: Gpu::new(options), text }
    }

    /// What the machine says when it loads the kernel.
    pub(crate) fn load(&self) -> Result<Module, Error> {
        Module::load("test.ptx", &self.text)
    }

    pub(crate) fn upload(&mut self, name: &str, bytes: &[u8]) -> DevicePtr {
        let ptr = self.gpu.alloc_named(bytes.len(), name).unwrap();
        self.gpu.write(ptr, bytes).unwrap();
        ptr
    }

    pub(crate) fn words(&mut self, name: &str, words: &[u32]) -> DevicePtr {
        self.upload(name, bytemuck::cast_slice(words))
    }

    pub(crate) fn read(&self, ptr: DevicePtr, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        self.gpu.read(ptr, &mut data).unwrap();
        data
    }

    pub(crate) fn read_words(&self, ptr: DevicePtr, n: usize) -> Vec<u32> {
        self.read(ptr, n * 4).chunks(4).map(|c| u32::from_le_bytes(c.try_into().unwrap())).collect()
    }

    pub(crate) fn run(&mut self, blocks: u32, threads: u32, args: &[u64]) -> Result<Report, Error> {
        let module = self.load()?;
        let loaded = self.gpu.load(&module).unwrap();
        let args: Vec<Arg> = (0..3).map(|i| Arg::U64(args.get(i).copied().unwrap_or(0))).collect();
        self.gpu.launch(&loaded, "test", &Launch::linear(blocks, threads), &args)
    }

    /// A launch without any finding.
    pub(crate) fn ok(&mut self, blocks: u32, threads: u32, args: &[u64]) -> Report {
        let text = self.text.clone();
        self.run(blocks, threads, args).unwrap_or_else(|e| panic!("{text}\n{e}"))
    }

    /// What a launch finds; it must find something.
    pub(crate) fn findings(&mut self, blocks: u32, threads: u32, args: &[u64]) -> Vec<Finding> {
        match self.run(blocks, threads, args) {
            Err(Error::Fault(findings)) => findings,
            other => panic!("{}\n{other:?}", self.text),
        }
    }

    /// Runs the kernel and expects findings of this one kind.
    pub(crate) fn wrong(&mut self, blocks: u32, threads: u32, args: &[u64], kind: ErrorKind) -> Finding {
        let found = self.findings(blocks, threads, args);
        assert!(found.iter().all(|f| f.kind == kind), "{}\n{found:#?}", self.text);
        found[0].clone()
    }
}
