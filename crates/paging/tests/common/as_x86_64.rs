// What the formats of these tests have in common with x86-64's: how a word says what it says.

/// The items of a [`Format`](kmem_paging::format::Format) that are as x86-64's in all of them.
macro_rules! as_x86_64 {
    () => {
        type Word = u64;
        const LEVELS: &'static [Level] = X86_64::LEVELS;
        const MIN_LEVELS: usize = X86_64::MIN_LEVELS;
        const SOFT_BITS: u32 = X86_64::SOFT_BITS;
        const PAYLOAD_BITS: u32 = X86_64::PAYLOAD_BITS;
        const FRAME_LIMIT: u64 = X86_64::FRAME_LIMIT;
        const TABLE_FRAME_LIMIT: u64 = X86_64::TABLE_FRAME_LIMIT;
        const ROOT_FRAME_LIMIT: u64 = X86_64::ROOT_FRAME_LIMIT;
        const FIXED_TOP: bool = false;

        fn canonical(levels: usize) -> Canonical {
            X86_64::canonical(levels)
        }
        fn leaf(level: usize, frame: Frame, attributes: &Attributes) -> u64 {
            X86_64::leaf(level, frame, attributes)
        }
        fn table(level: usize, frame: Frame) -> u64 {
            X86_64::table(level, frame)
        }
        fn payload(payload: Payload) -> u64 {
            X86_64::payload(payload)
        }
        fn kind(level: usize, word: u64) -> Kind {
            X86_64::kind(level, word)
        }
        fn table_frame(word: u64) -> Frame {
            X86_64::table_frame(word)
        }
        fn leaf_frame(level: usize, word: u64) -> Frame {
            X86_64::leaf_frame(level, word)
        }
        fn attributes(level: usize, word: u64) -> Attributes {
            X86_64::attributes(level, word)
        }
        fn payload_of(word: u64) -> Payload {
            X86_64::payload_of(word)
        }
        fn is_settled(word: u64) -> bool {
            X86_64::is_settled(word)
        }
    };
}
