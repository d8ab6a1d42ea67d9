//! The heap from nothing to exhaustion, in its own words; boot tables good and bad.

use std::alloc::{GlobalAlloc, Layout};

use kmem::boot::{E820Entry, PvhEntry, e820, pvh, raw};
use kmem::{
    AllocError, BootMap, FrameRequest, FrameSink, FrameSource, Heap, InitError, PhysAddr, PhysMap,
    RegionKind,
};

/// Memory of `mib` MiB at 1 MiB; gives the offset at which it is mapped.
fn arena(mib: usize) -> usize {
    let bytes = vec![0u8; (mib + 1) << 20].leak();
    let base = (bytes.as_mut_ptr().expose_provenance() + 0xf_ffff) & !0xf_ffff;
    base.wrapping_sub(1 << 20)
}

fn map(mib: u64) -> BootMap {
    let mut map = BootMap::new();
    map.push(PhysAddr::new(1 << 20), mib << 20, RegionKind::Usable)
        .unwrap();
    map
}

#[test]
fn a_heap_says_why_it_refuses() {
    static HEAP: Heap = Heap::new();
    let page = Layout::from_size_align(4096, 4096).unwrap();
    // SAFETY: the layout has a size.
    assert!(unsafe { HEAP.alloc(page) }.is_null());
    let said = HEAP.explain().to_string();
    assert!(
        said.contains("not initialised") && said.contains("(1 were refused"),
        "{said}"
    );
    assert_eq!(
        HEAP.memory()
            .frames()
            .alloc(&FrameRequest::ONE)
            .unwrap_err(),
        AllocError::NotInitialised
    );

    let offset = arena(16);
    // SAFETY: the arena is mapped there and nobody's; one thread uses the heap.
    unsafe { HEAP.init(&mut map(16), offset) }.unwrap();
    assert!(
        HEAP.explain()
            .to_string()
            .starts_with("1 allocations were refused")
    );
    // SAFETY: as above; refused.
    let again = unsafe { HEAP.init(&mut map(16), offset) };
    assert!(matches!(
        again,
        Err(InitError::Frames(kmem::buddy::InitError::Twice))
    ));

    let frame = HEAP.memory().frames().alloc(&FrameRequest::ONE).unwrap();
    let mut held = Vec::new();
    loop {
        // SAFETY: the layout has a size.
        let memory = unsafe { HEAP.alloc(page) };
        if memory.is_null() {
            break;
        }
        assert_eq!(memory.addr() % 4096, 0);
        held.push(memory);
    }
    assert!(held.len() > 2000, "{} pages of 16 MiB", held.len());
    let said = HEAP.explain().to_string();
    assert!(
        said.contains("the last asked for 4096 bytes aligned to 4096"),
        "{said}"
    );
    assert!(
        said.contains("KiB in slabs of") && said.contains("Node 0, zone"),
        "{said}"
    );
    assert!(
        said.contains("taken from the page-frame allocator directly"),
        "{said}"
    );

    // More than any block, with all memory back.
    for memory in held {
        // SAFETY: allocated above with this layout.
        unsafe { HEAP.dealloc(memory, page) };
    }
    HEAP.memory().frames().free(frame);
    let huge = Layout::from_size_align(64 << 20, 4096).unwrap();
    // SAFETY: the layout has a size.
    assert!(unsafe { HEAP.alloc(huge) }.is_null());
    let said = HEAP.explain().to_string();
    assert!(said.contains("more than the largest block"), "{said}");

    let info = HEAP.meminfo();
    let recount = HEAP.memory().frames().recount();
    assert_eq!(info.total, recount.managed);
    HEAP.memory().frames().check().unwrap();
    assert_eq!(HEAP.memory().frames().misuse(), None);
}

#[test]
fn a_machine_without_memory_is_an_error_in_words() {
    static HEAP: Heap = Heap::new();
    let mut empty: BootMap = BootMap::new();
    // SAFETY: no memory is named.
    let error = unsafe { HEAP.init(&mut empty, 0) }.unwrap_err();
    assert_eq!(
        error.to_string(),
        "page-frame allocator: the boot map has no usable memory"
    );
    // One MiB has no room for the slots of a section.
    let offset = arena(1);
    // SAFETY: as in the other test.
    let error = unsafe { HEAP.init(&mut map(1), offset) }.unwrap_err();
    assert!(error.to_string().starts_with("frame table: no "), "{error}");
    // And a later try with more works.
    let offset = arena(8);
    // SAFETY: as in the other test.
    unsafe { HEAP.init(&mut map(8), offset) }.unwrap();
    // Once it works it goes on as it is: memory is where it was.
    let memory = HEAP.memory().frames().memory();
    let frame = kmem_hal::PhysAddr::new(0x30_0000);
    let (pointer, reach) = (memory.to_ptr(frame), memory.reach());
    // SAFETY: refused before the memory is looked at.
    let error = unsafe { HEAP.init(&mut map(16), offset ^ 0x1000) }.unwrap_err();
    assert!(error.to_string().contains("initialised already"), "{error}");
    assert_eq!((memory.to_ptr(frame), memory.reach()), (pointer, reach));
}

#[test]
fn boot_tables_of_three_shapes_agree() {
    let entries = [
        (0x10_0000, 63 << 20, 1),
        (0xf_0000, 0x1_0000, 2),
        (0, 0x9_fc00, 1),
    ];
    let mut maps: [BootMap; 4] = [
        BootMap::new(),
        BootMap::new(),
        BootMap::new(),
        BootMap::new(),
    ];
    e820(
        &mut maps[0],
        &entries.map(|(base, length, kind)| E820Entry { base, length, kind }),
    )
    .unwrap();
    pvh(
        &mut maps[1],
        &entries.map(|(base, length, kind)| PvhEntry {
            base,
            length,
            kind,
            reserved: 0,
        }),
    )
    .unwrap();
    for (map, stride) in [(2, 20), (3, 24)] {
        let mut bytes = Vec::new();
        for (base, length, kind) in entries {
            let mut entry = [base.to_le_bytes(), length.to_le_bytes()].concat();
            entry.extend(u32::to_le_bytes(kind));
            entry.resize(stride, 0);
            bytes.extend(entry);
        }
        raw(&mut maps[map], &bytes, stride).unwrap();
        let cut = raw(&mut BootMap::<8>::new(), &bytes[..stride + 3], stride).unwrap_err();
        assert_eq!(
            cut.to_string(),
            format!(
                "a table of {} bytes is no multiple of an entry's {stride}",
                stride + 3
            )
        );
    }
    for map in &maps {
        assert_eq!(map.present_frames(), 63 * 256 + 0x9f - 1);
        assert!(map.regions().eq(maps[0].regions()));
    }
    let bad = E820Entry {
        base: 1 << 52,
        length: 1,
        kind: 1,
    };
    let error = e820(&mut maps[0], &[bad]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "region 4: end: 0x10000000000000 is beyond the last physical address 0xfffffffffffff"
    );
}
