//! Little-endian numbers out of tables that are only bytes.

/// The number that these bytes are.
pub(super) fn number(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |sum, &byte| sum << 8 | u64::from(byte))
}

/// The 32-bit number at `at`; `None` where the bytes end before.
pub(super) fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let end = at.checked_add(4)?;
    Some(number(bytes.get(at..end)?) as u32)
}

/// The 64-bit number at `at`; `None` where the bytes end before.
pub(super) fn long(bytes: &[u8], at: usize) -> Option<u64> {
    let end = at.checked_add(8)?;
    Some(number(bytes.get(at..end)?))
}
