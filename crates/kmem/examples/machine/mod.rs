//! A kernel's memory in one place: what the examples and tests around it stand on. A host's memory plays the machine's, and no
//! processor walks the tables, so what is mapped can be asked for and not touched.
#![allow(dead_code, reason = "each example uses a part")]

use kmem::hal::{FixedPool, FlushRequest, Mmu, NoCpuCall, NoPressure, Root, SingleGrace, Spin};
use kmem::paging::format::X86_64;
use kmem::paging::{PageTable, Parts};
use kmem::vma_tree::Node;
use kmem::vmalloc::{KernelLayout, KernelPage, Vmalloc};
use kmem::{BootMap, Config, LateLarge, Memory, OffsetMap, PhysAddr, RegionKind, SingleCpu};

/// A real kernel writes CR3 and executes `invlpg` here.
pub struct NoMmu;

// SAFETY: M1 to M4: no processor translates through these tables.
unsafe impl Mmu for NoMmu {
    unsafe fn load_root(&self, _root: Root, _keep: bool) {}
    fn flush_local(&self, _request: &FlushRequest) {}
}

pub type Frames = kmem::Frames<OffsetMap, SingleCpu, Spin>;
pub type Env = Parts<'static, &'static OffsetMap, &'static Frames, NoMmu, SingleGrace, SingleCpu>;
pub type Kernel = Vmalloc<'static, X86_64, &'static Env, &'static FixedPool<Node, 64>, Spin>;
pub type World =
    Memory<OffsetMap, SingleCpu, Spin, NoCpuCall, NoPressure, &'static LateLarge<Kernel>>;

/// Frames, frame table, slab system.
// SAFETY: one CPU: one thread of each program uses it.
pub static WORLD: World =
    unsafe { Memory::with(OffsetMap::unset(), SingleCpu::new(), NoCpuCall, NoPressure) };

/// Where the slab system finds vmalloc.
pub static LARGE: LateLarge<Kernel> = LateLarge::new();

static NODES: FixedPool<Node, 64> = FixedPool::new();

/// Starts everything on `mib` MiB of memory; gives vmalloc, which the slab system uses from here on.
pub fn start(mib: usize) -> &'static Kernel {
    let bytes = vec![0u8; (mib + 2) << 20].leak();
    let base = (bytes.as_mut_ptr().expose_provenance() + 0xf_ffff) & !0xf_ffff;
    let mut map: BootMap = BootMap::new();
    map.push(
        PhysAddr::new(1 << 20),
        (mib as u64) << 20,
        RegionKind::Usable,
    )
    .expect("one entry fits");
    let frames = ((mib as u64) << 8) + 256;
    // SAFETY: the memory of the map is mapped there.
    unsafe {
        WORLD
            .frames()
            .memory()
            .set(base.wrapping_sub(1 << 20), frames);
    }
    // SAFETY: X1: the arena is this example's alone.
    unsafe { WORLD.init_with(&mut map, &Config::new(), &LARGE) }
        .expect("memory for the allocators");
    // SAFETY: one machine's parts, used by one thread.
    let env: &'static Env = Box::leak(Box::new(unsafe {
        Parts::new(
            WORLD.frames().memory(),
            WORLD.frames(),
            NoMmu,
            SingleGrace::new(),
            SingleCpu::new(),
            WORLD.table(),
        )
    }));
    let table = Box::leak(Box::new(
        PageTable::<X86_64, _, KernelPage>::new(env).expect("a frame for the root"),
    ));
    let window = KernelLayout::x86_64().vmalloc;
    let kernel = Box::leak(Box::new(Vmalloc::new(table, window, &NODES)));
    LARGE.set(kernel);
    kernel
}
