//! The report of a run: one HTML file that needs no other file, the same as plain text, and the picture alone.
//!
//! ```text
//!   DIR/report.html   pictures and text
//!   DIR/report.txt    the text
//!   DIR/memory.svg    physical memory
//! ```
//! Nothing in it loads anything from anywhere; all text is escaped.

pub mod picture;

use crate::input::InputError;
use core::fmt::Write;
use picture::Picture;
use std::path::Path;

/// A run, ready to be written.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// What was booted.
    pub title: String,
    /// Headed pieces of text, in order.
    pub sections: Vec<(String, String)>,
    /// Physical memory.
    pub picture: Picture,
}

impl Report {
    /// Adds a piece of text.
    pub fn section(&mut self, heading: &str, text: impl Into<String>) {
        self.sections.push((heading.into(), text.into()));
    }

    /// Writes all files; makes the folder if it is missing.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn write(&self, folder: &Path) -> Result<(), InputError> {
        let shown = folder.display().to_string();
        let refuse =
            |e: std::io::Error| InputError::new(&shown, 0, "report", &shown, e.to_string());
        std::fs::create_dir_all(folder).map_err(refuse)?;
        let files = [
            ("report.txt", self.text()),
            ("memory.svg", self.picture.svg()),
            ("report.html", self.html()),
        ];
        for (name, content) in files {
            std::fs::write(folder.join(name), content).map_err(refuse)?;
        }
        Ok(())
    }

    /// Returns the report as plain text.
    pub fn text(&self) -> String {
        let mut out = format!(
            "{}\n{}\n",
            self.title,
            "=".repeat(self.title.chars().count())
        );
        for (heading, text) in &self.sections {
            let _ = write!(
                out,
                "\n{heading}\n{}\n{}\n",
                "-".repeat(heading.chars().count()),
                text.trim_end()
            );
        }
        out
    }

    /// Returns the report as one HTML page.
    pub fn html(&self) -> String {
        let mut out = String::from(
            "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>",
        );
        out.push_str(&escape(&self.title));
        out.push_str(
            "</title><style>body{font-family:sans-serif;margin:2em;max-width:75em}\
             pre{background:#f4f4f4;padding:.8em;overflow-x:auto}svg{max-width:100%;height:auto}</style></head><body>\n",
        );
        let _ = writeln!(out, "<h1>{}</h1>", escape(&self.title));
        let _ = writeln!(out, "<h2>Physical memory</h2>\n{}", self.picture.svg());
        for (heading, text) in &self.sections {
            let _ = writeln!(
                out,
                "<h2>{}</h2>\n<pre>{}</pre>",
                escape(heading),
                escape(text.trim_end())
            );
        }
        out.push_str("</body></html>\n");
        out
    }
}

/// Escapes text for HTML and SVG.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c if c.is_control() && c != '\n' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_the_text_becomes_markup() {
        let mut r = Report {
            title: "a <b> & c".into(),
            ..Report::default()
        };
        r.section("x", "<script>alert(1)</script>\u{1b}");
        let html = r.html();
        assert!(!html.contains("<script"));
        assert!(html.contains("a &lt;b&gt; &amp; c"));
        assert!(!html.contains('\u{1b}'));
        assert!(!html.contains("src="));
        assert!(r.text().contains("<script>"));
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_said() {
        let r = Report::default();
        let e = r.write(Path::new("/proc/self/status/x")).unwrap_err();
        assert_eq!(e.field, "report");
    }
}
