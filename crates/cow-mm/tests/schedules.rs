//! Threads of one program under a schedule: a call on one CPU, faults on another in the middle of it.

use kmem_cow_mm::{
    AddressSpace, Advice, DeviceMemory, Layout, MapFlags, MapRequest, Mm, OpenFile, Outcome, Parts,
    Prot, RemapFlags, SpaceMemory, VmaMemory,
};
use kmem_hal::{Frame, FrameRange, FrameTable, Mmu, NoTrace, Page, PhysAddr, VirtAddr};
use kmem_mock_x86::{
    Device, FramePool, Machine, MachineGrace, MachineSleepLock, MemoryMap, Scheduler,
};
use kmem_paging::TableCache;
use kmem_paging::format::X86_64;
use kmem_testkit::{HeapObjects, SlotArena};
use kmem_vma_tree::Node;

const PAGE: u64 = 4096;
const PAGES: u64 = 8;
const HERE: u64 = 0x1000_0000;
const THERE: u64 = 0x2000_0000;

/// Tables whose locks let the other CPUs run.
struct Tables {
    machine: &'static Machine,
    frames: FramePool<'static>,
    grace: MachineGrace<'static>,
    slots: SlotArena,
    cache: TableCache,
}

// SAFETY: E1: fields never change; E2: one frame table for all frames of the machine; E3: the machine's MMU walks the machine's memory;
// E4: the cache is this environment's own; E5: there is one environment.
unsafe impl kmem_paging::Env for Tables {
    type Map = Machine;
    type Frames = FramePool<'static>;
    type Mmu = Machine;
    type Grace = MachineGrace<'static>;
    type Cpu = Machine;
    type Trace = NoTrace;

    fn map(&self) -> &Machine {
        self.machine
    }
    fn frames(&self) -> &FramePool<'static> {
        &self.frames
    }
    fn mmu(&self) -> &Machine {
        self.machine
    }
    fn grace(&self) -> &MachineGrace<'static> {
        &self.grace
    }
    fn cpu(&self) -> &Machine {
        self.machine
    }
    fn trace(&self) -> &NoTrace {
        &NoTrace
    }
    fn slots(&self) -> &FrameTable {
        &self.slots
    }
    fn cache(&self) -> &TableCache {
        &self.cache
    }
    fn relax(&self) {
        self.machine.yield_now();
    }
}

type Nodes = HeapObjects<Node>;
type World = Parts<
    Tables,
    X86_64,
    Nodes,
    HeapObjects<VmaMemory>,
    HeapObjects<kmem_cow_mm::Object<Nodes, MachineSleepLock>>,
    HeapObjects<SpaceMemory>,
    MachineSleepLock,
>;
type Space = AddressSpace<'static, World>;

fn forever<T>(value: T) -> &'static T {
    Box::leak(Box::new(value))
}

fn mm(machine: &'static Machine) -> &'static Mm<'static, World> {
    let frames = FrameRange::new(Frame::ZERO, machine.memory().frame_limit());
    let tables = Tables {
        machine,
        frames: FramePool::new(machine, 256),
        grace: MachineGrace::new(machine),
        slots: SlotArena::new(frames.unwrap()),
        cache: TableCache::new(8),
    };
    // SAFETY: the table covers the machine's memory, whose MMU walks the tables; the world is never moved.
    let world = forever(unsafe {
        World::new(
            tables,
            HeapObjects::new(),
            HeapObjects::new(),
            HeapObjects::new(),
            HeapObjects::new(),
        )
    });
    forever(Mm::new(world).unwrap())
}

/// Writes a word as a program does; `false` where nothing is mapped.
fn store(machine: &'static Machine, space: &Space, address: u64) -> bool {
    let cpu = machine.cpu(machine.current_cpu()).user();
    loop {
        let Err(fault) = cpu.write_u64(address, address) else {
            return true;
        };
        match space.fault(&fault.as_page_fault().unwrap()) {
            Outcome::Handled => {}
            Outcome::Signal { .. } => return false,
            other => panic!("{other:?}"),
        }
    }
}

fn mapped(space: &Space, start: u64) -> usize {
    (0..PAGES)
        .map(|page| Page::containing(VirtAddr::new(start + page * PAGE)))
        .filter(|page| space.frame_at(*page).is_some())
        .count()
}

/// A device that answers nothing.
struct Silent;

impl Device for Silent {
    fn read(&mut self, _offset: u64, _bytes: u32) -> u64 {
        0
    }
    fn write(&mut self, _offset: u64, _bytes: u32, _value: u64) {}
}

/// Where the device is.
const DEVICE: u64 = 0xfe00_0000;

fn open_device(mm: &'static Mm<'static, World>) -> OpenFile {
    let memory = DeviceMemory {
        frames: FrameRange::inside(PhysAddr::new(DEVICE), PAGES * PAGE),
        memory_type: kmem_paging::MemoryType::Uncached,
    };
    // SAFETY: no memory is there.
    let file = unsafe { mm.open_device(memory, "/dev/silent", 0) }.unwrap();
    OpenFile {
        file,
        readable: true,
        writable: true,
    }
}

fn map_device(space: &Space, open: OpenFile) {
    let request = MapRequest {
        flags: MapFlags::SHARED,
        file: Some(open),
        ..MapRequest::anonymous(PAGES * PAGE, Prot::READ | Prot::WRITE)
    };
    space.mmap(&request.at(HERE)).unwrap();
}

/// A machine of two CPUs with the device.
fn machine_with_device() -> &'static Machine {
    let machine = Machine::builder().memory(MemoryMap::pc(32 << 20)).cpus(2);
    let machine = forever(machine.build().unwrap());
    machine.attach_memory(DEVICE, DEVICE + PAGES * PAGE - 1, Silent);
    machine
}

fn run_in(machine: &'static Machine, space: &Space) {
    for cpu in 0..2 {
        // SAFETY: the mock's kernel code does not run in the tables.
        machine.on_cpu(cpu, || unsafe { machine.load_root(space.root(), false) });
    }
}

fn run_in_none(machine: &'static Machine) {
    let nothing = kmem_hal::Root {
        frame: Frame::ZERO,
        asid: kmem_hal::Asid::ZERO,
    };
    for cpu in 0..2 {
        // SAFETY: as above.
        machine.on_cpu(cpu, || unsafe { machine.load_root(nothing, false) });
    }
}

/// Who sees that a device's object is gone may use its frames for something else: no program reaches them any more.
#[test]
fn a_device_ends_after_its_last_translation() {
    let machine = machine_with_device();
    let mm = mm(machine);
    for seed in 0..200 {
        let space = Space::new(mm, Layout::x86_64()).unwrap();
        let open = open_device(mm);
        map_device(&space, open);
        assert!(mm.close(open.file));
        run_in(machine, &space);
        assert!(machine.on_cpu(0, || store(machine, &space, HERE)));
        assert_eq!(mapped(&space, HERE), PAGES as usize);
        let mut schedule = Scheduler::new(machine, seed);
        schedule.spawn(0, || {
            if seed % 2 == 0 {
                space.munmap(HERE, PAGES * PAGE).unwrap();
            } else {
                let other = MapRequest::anonymous(PAGES * PAGE, Prot::READ);
                space.mmap(&other.at(HERE)).unwrap();
            }
        });
        schedule.spawn(1, || {
            while mm.object_info(open.file).is_ok() {
                machine.yield_now();
            }
            assert_eq!(mapped(&space, HERE), 0, "seed {seed}");
        });
        schedule.run();
        run_in_none(machine);
    }
}

/// What `MADV_COLD` was accepted for may be a device's by the time that it is done.
#[test]
fn a_device_is_mapped_while_pages_become_cold() {
    const BEFORE: u64 = 24;
    const PROTS: [Prot; 2] = [Prot::READ, Prot::empty()];
    let machine = machine_with_device();
    let mm = mm(machine);
    let open = open_device(mm);
    for seed in 0..200 {
        let space = Space::new(mm, Layout::x86_64()).unwrap();
        // Many mappings before it, so that there is time.
        for page in 0..BEFORE {
            let request = MapRequest::anonymous(PAGE, PROTS[page as usize % 2]);
            space
                .mmap(&request.at(HERE - (BEFORE - page) * PAGE))
                .unwrap();
        }
        let request = MapRequest::anonymous(PAGES * PAGE, Prot::READ | Prot::WRITE);
        space.mmap(&request.at(HERE)).unwrap();
        run_in(machine, &space);
        assert!(machine.on_cpu(0, || store(machine, &space, HERE)));
        let advice = match seed % 2 {
            0 => Advice::Cold,
            _ => Advice::PageOut,
        };
        let mut schedule = Scheduler::new(machine, seed);
        schedule.spawn(0, || {
            let _ = space.madvise(HERE - BEFORE * PAGE, (BEFORE + PAGES) * PAGE, advice);
        });
        schedule.spawn(1, || {
            map_device(&space, open);
            assert!(store(machine, &space, HERE));
        });
        schedule.run();
        assert_eq!(mapped(&space, HERE), PAGES as usize);
        run_in_none(machine);
    }
}

/// A fault puts no page where mremap takes the mapping away.
#[test]
fn no_page_stays_where_a_mapping_was() {
    let machine = Machine::builder().memory(MemoryMap::pc(32 << 20)).cpus(2);
    let machine = forever(machine.build().unwrap());
    let mm = mm(machine);
    for seed in 0..200 {
        let space = Space::new(mm, Layout::x86_64()).unwrap();
        let request = MapRequest::anonymous(PAGES * PAGE, Prot::READ | Prot::WRITE);
        space.mmap(&request.at(HERE)).unwrap();
        for cpu in 0..2 {
            // SAFETY: the mock's kernel code does not run in the tables.
            machine.on_cpu(cpu, || unsafe { machine.load_root(space.root(), false) });
        }
        // Faults of the other thread need no lock of the space from here on.
        assert!(machine.on_cpu(0, || store(machine, &space, HERE)));
        let mut schedule = Scheduler::new(machine, seed);
        schedule.spawn(0, || {
            let length = PAGES * PAGE;
            let flags = RemapFlags::MAYMOVE | RemapFlags::FIXED;
            space.mremap(HERE, length, length, flags, THERE).unwrap();
        });
        schedule.spawn(1, || {
            for page in 1..PAGES {
                store(machine, &space, HERE + page * PAGE);
            }
        });
        schedule.run();
        assert_eq!(mapped(&space, HERE), 0, "seed {seed}");
        assert!(mapped(&space, THERE) > 0);
        let nothing = kmem_hal::Root {
            frame: kmem_hal::Frame::ZERO,
            asid: kmem_hal::Asid::ZERO,
        };
        for cpu in 0..2 {
            // SAFETY: as above.
            machine.on_cpu(cpu, || unsafe { machine.load_root(nothing, false) });
        }
    }
}
