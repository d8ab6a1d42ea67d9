//! A multi-threaded program on kmem: counts words, then shows what the memory manager saw.
//!
//! `cargo run --release -p kmem-host --example words`

use std::collections::HashMap;

#[global_allocator]
static HEAP: kmem_host::HostHeap = kmem_host::HostHeap::new();

fn main() {
    let text = include_str!("../README.md").repeat(200);
    let parts: Vec<&str> = text.split("\n\n").collect();
    let mut total: HashMap<String, usize> = HashMap::new();
    std::thread::scope(|scope| {
        let counts: Vec<_> = parts
            .chunks(parts.len() / 4 + 1)
            .map(|chunk| {
                scope.spawn(move || {
                    let mut counts: HashMap<String, usize> = HashMap::new();
                    for word in chunk.iter().flat_map(|part| part.split_whitespace()) {
                        *counts.entry(word.to_lowercase()).or_default() += 1;
                    }
                    counts
                })
            })
            .collect();
        for count in counts {
            for (word, n) in count.join().expect("a counter does not panic") {
                *total.entry(word).or_default() += n;
            }
        }
    });
    let mut words: Vec<_> = total.into_iter().collect();
    words.sort_by_key(|(word, n)| (usize::MAX - n, word.clone()));
    for (word, n) in words.iter().take(5) {
        println!("{n:8} {word}");
    }
    let memory = HEAP.memory().expect("started by the first allocation");
    println!(
        "\n{}\n{}",
        memory.slab().slabinfo(),
        memory.frames().mem_info()
    );
}
