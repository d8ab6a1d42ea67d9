//! Makes ELF images, of both classes, byte by byte.

/// A segment to be: where in the file and in memory, how long there and there, and the bits of its rights (1 x, 2 w, 4 r).
#[derive(Clone, Copy, Debug)]
pub struct Part {
    pub offset: u64,
    pub address: u64,
    pub file_size: u64,
    pub memory_size: u64,
    pub rights: u32,
}

/// An image to be.
#[derive(Clone, Debug)]
pub struct Builder {
    pub wide: bool,
    pub position_independent: bool,
    pub entry: u64,
    pub parts: Vec<Part>,
    pub interpreter: Option<&'static str>,
    /// What `PT_GNU_STACK` says; `None` for no such entry.
    pub stack: Option<u32>,
    /// Bytes of the file.
    pub size: usize,
}

/// Bytes behind the table of program headers for the interpreter's path.
const PATH_ROOM: usize = 0x100;

impl Builder {
    pub fn new(wide: bool, parts: &[Part]) -> Self {
        let end = parts.iter().map(|part| part.offset + part.file_size).max();
        Self {
            wide,
            position_independent: false,
            entry: parts[0].address + 0x400,
            parts: parts.to_vec(),
            interpreter: None,
            stack: Some(6),
            size: end.unwrap_or(0) as usize,
        }
    }

    pub fn build(&self) -> Vec<u8> {
        let (header, entry) = if self.wide { (64, 56) } else { (52, 32) };
        let count = self.parts.len() + 2;
        let path_at = (header + count * usize::from(entry)).max(0x300);
        let room = path_at + PATH_ROOM;
        let mut bytes: Vec<u8> = (0..self.size.max(room))
            .map(|at| (at / 16 % 251) as u8 | 1)
            .collect();
        bytes[..room].fill(0);
        let mut entries = Vec::new();
        if let Some(path) = self.interpreter {
            bytes[path_at..path_at + path.len()].copy_from_slice(path.as_bytes());
            let length = path.len() as u64 + 1;
            let at = path_at as u64;
            entries.push((3u32, 4u32, at, at, length, length, 1u64));
        }
        for part in &self.parts {
            let (from, to) = (part.offset, part.address);
            let sizes = (part.file_size, part.memory_size);
            entries.push((1, part.rights, from, to, sizes.0, sizes.1, 0x1000));
        }
        if let Some(rights) = self.stack {
            entries.push((0x6474_e551, rights, 0, 0, 0, 0, 16));
        }
        let mut head = b"\x7fELF".to_vec();
        head.extend([if self.wide { 2 } else { 1 }, 1, 1, 0]);
        head.resize(16, 0);
        let half = |head: &mut Vec<u8>, value: u16| head.extend(value.to_le_bytes());
        half(&mut head, if self.position_independent { 3 } else { 2 });
        half(&mut head, if self.wide { 62 } else { 3 });
        head.extend(1u32.to_le_bytes());
        self.word(&mut head, self.entry);
        self.word(&mut head, header as u64);
        self.word(&mut head, 0);
        head.extend(0u32.to_le_bytes());
        for value in [header as u16, entry, entries.len() as u16, 0, 0, 0] {
            half(&mut head, value);
        }
        for (kind, rights, offset, address, file_size, memory_size, alignment) in entries {
            head.extend(kind.to_le_bytes());
            if self.wide {
                head.extend(rights.to_le_bytes());
            }
            for value in [offset, address, address, file_size, memory_size] {
                self.word(&mut head, value);
            }
            if !self.wide {
                head.extend(rights.to_le_bytes());
            }
            self.word(&mut head, alignment);
        }
        assert!(head.len() <= path_at);
        bytes[..head.len()].copy_from_slice(&head);
        bytes
    }

    fn word(&self, to: &mut Vec<u8>, value: u64) {
        match self.wide {
            true => to.extend(value.to_le_bytes()),
            false => to.extend((value as u32).to_le_bytes()),
        }
    }
}
