//! Inputs that travel inside the binary, so that `kmem` runs without a file.
//!
//! Maps are plain text under `data/maps`; recorded runs are gzip under `data/oracle`. Nothing here is unpacked before it is
//! asked for.

use crate::input::{InputError, lines::Source};

/// A named piece of embedded data.
#[derive(Clone, Copy)]
pub struct Embedded {
    /// The name, without folder and extensions.
    pub name: &'static str,
    /// The bytes, gzip or plain.
    pub bytes: &'static [u8],
}

impl Embedded {
    /// Opens the data for reading.
    ///
    /// # Errors
    /// As [`Source::embedded`].
    pub fn open(&self) -> Result<Source, InputError> {
        Source::embedded(self.name, self.bytes)
    }
}

macro_rules! embed {
    ($folder:literal, $extension:literal: $($name:literal)*) => {
        &[$(Embedded { name: $name, bytes: include_bytes!(concat!("../data/", $folder, "/", $name, $extension)) }),*]
    };
}

/// Memory maps of real machines.
pub static MAPS: &[Embedded] = embed!("maps", ".txt":
    "asus-p5p43-16g" "dell-t3600-efi" "firecracker-24g" "qemu-q35-64m" "sun-x4600-numa8");

/// Recorded memory calls of real programs.
pub static TRACES: &[Embedded] = embed!("oracle/traces", ".txt.gz":
    "git-log" "java-threads" "ls" "perl" "python-threads" "rustc" "sort-parallel" "sqlite3");

/// Recorded random calls, one seed each.
pub static FUZZ: &[Embedded] = embed!("oracle/fuzz", ".txt.gz":
    "s001" "s002" "s003" "s004" "s005" "s006" "s007" "s008" "s009" "s010" "s011" "s012" "s013" "s014" "s015"
    "s016" "s017" "s018" "s019" "s020" "s021" "s022" "s023" "s024" "s025" "s026" "s027" "s028" "s029" "s030"
    "s031" "s032" "s033" "s034" "s035" "s036" "s037" "s038" "s039" "s040" "s041" "s042" "s043" "s044" "s045"
    "s046" "s047" "s048" "s049" "s050" "s051" "s052" "s053" "s054" "s055" "s056" "s057" "s058" "s059" "s060"
    "s061" "s062" "s063" "s064" "s065" "s066" "s067" "s068" "s069" "s070" "s071" "s072" "s073" "s074" "s075"
    "s076" "s077" "s078" "s079" "s080" "s081" "s082" "s083" "s084" "s085" "s086" "s087" "s088" "s089" "s090"
    "s091" "s092" "s093" "s094" "s095" "s096" "s097" "s098" "s099" "s100"
);

/// Finds a piece of embedded data by its name.
pub fn find(list: &'static [Embedded], name: &str) -> Option<&'static Embedded> {
    list.iter().find(|e| e.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::input::{field::At, fuzz, map, oracle, trace};

    #[test]
    fn every_embedded_map_is_read() {
        for m in MAPS {
            let map = map::read(m.open().unwrap()).unwrap();
            assert!(map.usable_bytes() > 60 << 20, "{}", m.name);
        }
        let sun = map::read(find(MAPS, "sun-x4600-numa8").unwrap().open().unwrap()).unwrap();
        assert_eq!(sun.node_numbers(), [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(sun.linux.present.len(), 10);
    }

    #[test]
    fn every_embedded_run_is_read_to_its_end() {
        let (mut calls, mut checkpoints) = (0, 0);
        for t in TRACES.iter().chain(FUZZ) {
            let mut source = t.open().unwrap();
            let name = source.name().to_string();
            let head = source.next_strict().unwrap();
            match oracle::kind(
                At {
                    file: &name,
                    line: 1,
                },
                head.as_deref(),
            )
            .unwrap()
            {
                oracle::RunKind::Fuzz => {
                    let mut r = fuzz::Reader::new(source, &head.unwrap()).unwrap();
                    while r.next_step().unwrap().is_some() {
                        calls += 1;
                    }
                }
                oracle::RunKind::Trace => {
                    let mut r = trace::Reader::new(source, &head.unwrap()).unwrap();
                    while let Some((_, e)) = r.next_event().unwrap() {
                        checkpoints += usize::from(matches!(e, trace::Event::Checkpoint { .. }));
                    }
                }
            }
        }
        // Counted in the unpacked files with `grep -c`.
        assert_eq!((calls, checkpoints), (27_473, 135));
    }
}
