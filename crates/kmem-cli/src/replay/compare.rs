//! Holds a manager's list of VMAs against Linux's.
//!
//! Names of shared anonymous memory are the recorder's (`sN`, the N-th ever made): the manager names its objects by keys
//! of its own, and [`Names`] remembers which key got which name.

use super::mm::{VmaSeen, Whose};
use crate::input::oracle::VmaLine;
use std::collections::HashMap;

/// Recorder's names for keys of shared memory.
#[derive(Debug, Clone, Default)]
pub struct Names {
    by_key: HashMap<u64, String>,
}

impl Names {
    /// Gives a name to a key; a later name replaces an earlier one.
    pub fn set(&mut self, key: u64, name: String) {
        self.by_key.insert(key, name);
    }

    /// Returns the name of a key, if it has one.
    pub fn get(&self, key: u64) -> Option<&str> {
        self.by_key.get(&key).map(String::as_str)
    }
}

/// Turns what a manager shows into the recorder's form.
pub fn line_of(seen: &VmaSeen, names: &Names) -> VmaLine {
    let id = match &seen.whose {
        Whose::Anonymous => "-".to_string(),
        Whose::File(name) | Whose::Special(name) => name.clone(),
        Whose::Shared(key) => names
            .get(*key)
            .map_or_else(|| format!("shared#{key}"), str::to_string),
    };
    VmaLine {
        start: seen.start,
        end: seen.end,
        perms: seen.perms,
        offset: seen.offset,
        id,
    }
}

/// Prints a VMA without blanks, so that a program can split the output at blanks.
pub fn compact(vma: Option<&VmaLine>) -> String {
    vma.map_or_else(
        || "no-vma".into(),
        |v| {
            format!(
                "{:x}-{:x}:{}:{:x}:{}",
                v.start, v.end, v.perms, v.offset, v.id
            )
        },
    )
}

/// Returns the first pair in which two ascending lists differ, in compact form, or `None` if they are equal.
///
/// The pair is the entry with the smallest address that only one of the lists has, and what the other has in its place.
pub fn difference<'a>(
    expected: impl IntoIterator<Item = &'a VmaLine>,
    got: impl IntoIterator<Item = &'a VmaLine>,
) -> Option<(String, String)> {
    let mut expected = expected.into_iter();
    let mut got = got.into_iter();
    loop {
        let (e, g) = (expected.next(), got.next());
        if e != g {
            return Some((compact(e), compact(g)));
        }
        e?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::input::oracle::Perms;

    fn vma(start: u64, end: u64) -> VmaLine {
        VmaLine {
            start,
            end,
            perms: Perms {
                prot: 3,
                shared: false,
            },
            offset: 0,
            id: "-".into(),
        }
    }

    #[test]
    fn finds_the_first_difference() {
        let a = [vma(0x1000, 0x2000), vma(0x3000, 0x4000)];
        let b = [vma(0x1000, 0x2000), vma(0x3000, 0x5000)];
        assert_eq!(difference(&a, &a), None);
        assert_eq!(
            difference(&a, &b),
            Some(("3000-4000:rw-p:0:-".into(), "3000-5000:rw-p:0:-".into()))
        );
        assert_eq!(
            difference(&a[..1], &a),
            Some(("no-vma".into(), "3000-4000:rw-p:0:-".into()))
        );
        assert_eq!(
            difference(&a, &a[..1]),
            Some(("3000-4000:rw-p:0:-".into(), "no-vma".into()))
        );
        assert_eq!(difference(&[], &[]), None);
    }

    #[test]
    fn keys_take_the_recorders_names() {
        let mut names = Names::default();
        names.set(9, "s0".into());
        let mut seen = VmaSeen {
            start: 0,
            end: 0x1000,
            perms: Perms {
                prot: 1,
                shared: true,
            },
            offset: 0x2000,
            whose: Whose::Shared(9),
        };
        assert_eq!(line_of(&seen, &names).to_string(), "0 1000 r--s 2000 s0");
        seen.whose = Whose::Shared(10);
        assert_eq!(line_of(&seen, &names).id, "shared#10");
    }
}
