//! Checks of [`UserAccess`], clauses `U1` and `U2`.

use kmem_hal::{UserAccess, VirtAddr};

use super::Report;

const NAME: &str = "UserAccess";

/// Addresses of the current space that the caller has prepared.
#[derive(Clone, Copy, Debug)]
pub struct UserAddresses {
    /// At least 64 bytes that a user may write, the last of them just below what no user may touch.
    pub end_of_writable: VirtAddr,
    /// At least 64 bytes that a user may read and not write.
    pub read_only: Option<VirtAddr>,
    /// Memory of the kernel, mapped and closed to users.
    pub kernel: Option<VirtAddr>,
}

/// Checks copies inside, across the end of, and outside user memory.
pub fn check<U: UserAccess>(report: &Report, access: &U, at: &UserAddresses) {
    let end = at.end_of_writable.as_u64();
    let start = VirtAddr::new(end - 64);
    let pattern: [u8; 64] = std::array::from_fn(|index| index as u8 ^ 0x5c);
    let there = access.copy_to_user(start, &pattern);
    let mut back = [0; 64];
    let here = access.copy_from_user(&mut back, start);
    report.check(
        NAME,
        "U1",
        there.is_ok() && here.is_ok() && back == pattern,
        || format!("64 bytes of writable user memory: {there:?}, {here:?}"),
    );

    for inside in [0usize, 1, 16, 63] {
        let from = VirtAddr::new(end - inside as u64);
        let mut buffer = [0xee; 64];
        let read = access.copy_from_user(&mut buffer, from);
        let fault = read.err();
        report.check(NAME, "U2", fault.is_some(), || {
            format!(
                "reading {} bytes past the end of user memory succeeded",
                64 - inside
            )
        });
        if let Some(fault) = fault {
            report.check(NAME, "U2", fault.address.as_u64() == end && fault.copied == inside, || {
                format!("reading from {from}, the first bad byte is {end:#x}, and {inside} come before it: {fault:?}")
            });
        }
        let kept = buffer[..inside] == pattern[64 - inside..]
            && buffer[inside..].iter().all(|&byte| byte == 0xee);
        report.check(NAME, "U2", kept, || {
            "a copy that failed left other bytes than those before the fault".into()
        });
        let wrote = access.copy_to_user(from, &[0x77; 64]).err();
        report.check(
            NAME,
            "U2",
            wrote.is_some_and(|fault| fault.copied == inside),
            || format!("writing across the end of user memory: {wrote:?}"),
        );
        // The prefix was written; put the pattern back.
        let _ = access.copy_to_user(start, &pattern);
    }

    if let Some(page) = at.read_only {
        let mut before = [0; 8];
        let read = access.copy_from_user(&mut before, page);
        let write = access.copy_to_user(page, &[0x99; 8]);
        let mut after = [0; 8];
        let _ = access.copy_from_user(&mut after, page);
        report.check(
            NAME,
            "U1",
            read.is_ok() && write.is_err() && before == after,
            || "memory that users may only read was written, or could not be read".into(),
        );
    }
    if let Some(kernel) = at.kernel {
        let mut buffer = [0xee; 8];
        let read = access.copy_from_user(&mut buffer, kernel);
        let write = access.copy_to_user(kernel, &buffer);
        report.check(
            NAME,
            "U1",
            read.is_err() && write.is_err() && buffer == [0xee; 8],
            || "a copy with the user's rights reached memory of the kernel".into(),
        );
    }
}
