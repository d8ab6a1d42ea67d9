//! Sizes and times in the units that people read.

use std::time::Duration;

/// Prints bytes in the largest binary unit that leaves a number of at least 1.
///
/// # Examples
/// ```
/// use kmem_cli::output::units::bytes;
/// assert_eq!(bytes(512), "512 B");
/// assert_eq!(bytes(64 << 20), "64 MiB");
/// assert_eq!(bytes(25_600 << 20), "25 GiB");
/// assert_eq!(bytes((3 << 30) / 2), "1.5 GiB");
/// ```
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut unit = 0;
    while unit + 1 < UNITS.len() && n >> (10 * (unit + 1)) != 0 {
        unit += 1;
    }
    let whole = n >> (10 * unit);
    let tenths = if unit == 0 {
        0
    } else {
        ((n >> (10 * (unit - 1))) & 1023) * 10 / 1024
    };
    if tenths == 0 {
        format!("{whole} {}", UNITS[unit])
    } else {
        format!("{whole}.{tenths} {}", UNITS[unit])
    }
}

/// Prints a number with blanks between its thousands.
///
/// # Examples
/// ```
/// assert_eq!(kmem_cli::output::units::grouped(4_194_104), "4 194 104");
/// ```
pub fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(' ');
        }
        out.push(c);
    }
    out
}

/// Prints a time in ms or s.
pub fn time(t: Duration) -> String {
    if t.as_millis() < 1000 {
        format!("{}.{} ms", t.as_millis(), t.as_micros() % 1000 / 100)
    } else {
        format!("{}.{:02} s", t.as_secs(), t.subsec_millis() / 10)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edges() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1024), "1 KiB");
        assert_eq!(bytes(u64::MAX), "16383.9 PiB");
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(1000), "1 000");
        assert_eq!(time(Duration::from_micros(1500)), "1.5 ms");
        assert_eq!(time(Duration::from_millis(2340)), "2.34 s");
    }
}
