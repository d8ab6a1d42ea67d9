//! A program whose global allocator is kmem: threads that come and go, remote frees, large vectors.

use std::collections::HashMap;
use std::sync::mpsc::sync_channel;
use std::sync::{Mutex, PoisonError};

use kmem_host::{HostHeap, MAX_THREADS, ThreadCpu};

#[global_allocator]
static HEAP: HostHeap = HostHeap::with_arena(2 << 30);

fn word_count(seed: u64, rounds: usize) -> HashMap<String, Vec<u64>> {
    let mut state = seed;
    let mut words: HashMap<String, Vec<u64>> = HashMap::new();
    for _ in 0..rounds {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let word = format!("word-{}", (state >> 40) % 1000);
        words.entry(word).or_default().push(state);
    }
    words
}

#[test]
fn threads_build_and_pass_on_collections() {
    let (send, receive) = sync_channel(4);
    let producers: Vec<_> = (0..4)
        .map(|seed| {
            let send = send.clone();
            std::thread::spawn(move || {
                for round in 0..5 {
                    send.send((seed, word_count(seed * 10 + round, 20_000)))
                        .unwrap();
                }
            })
        })
        .collect();
    drop(send);
    let mut total = 0;
    while let Ok((_, words)) = receive.recv() {
        total += words.values().map(Vec::len).sum::<usize>();
        // Dropped here: every byte is a remote free.
    }
    for producer in producers {
        producer.join().unwrap();
    }
    assert_eq!(total, 4 * 5 * 20_000);
    // Two ways of counting the same objects agree only while nothing runs; this bounds what was lost.
    let misuses = {
        let mut misuses = 0;
        HEAP.memory()
            .unwrap()
            .slab()
            .caches(|cache| misuses += cache.misuses)
            .unwrap();
        misuses
    };
    assert_eq!(misuses, 0);
}

/// Numbers are the process's: a test that takes all of them, and one that counts them, run one after the other.
static NUMBERS: Mutex<()> = Mutex::new(());

#[test]
fn threads_that_end_leave_nothing_behind() {
    let _numbers = NUMBERS.lock().unwrap_or_else(PoisonError::into_inner);
    for _ in 0..20 {
        let threads: Vec<_> = (0..16)
            .map(|seed| std::thread::spawn(move || word_count(seed, 500).len()))
            .collect();
        for thread in threads {
            assert!(thread.join().unwrap() > 300);
        }
    }
    // Numbers are leased again: 320 threads ran, and at most as many numbers are out as threads are alive.
    assert!(
        ThreadCpu.leased() < 64,
        "{} numbers leased",
        ThreadCpu.leased()
    );
    HEAP.shrink();
}

#[test]
fn more_threads_than_numbers_share_one() {
    let _numbers = NUMBERS.lock().unwrap_or_else(PoisonError::into_inner);
    let gate = std::sync::Barrier::new(MAX_THREADS as usize + 20);
    std::thread::scope(|scope| {
        let spawn = |seed| {
            let gate = &gate;
            std::thread::Builder::new()
                .stack_size(128 << 10)
                .spawn_scoped(scope, move || {
                    // All threads are alive at once.
                    let first = word_count(seed, 50);
                    gate.wait();
                    let second = word_count(seed, 50);
                    assert_eq!(first, second);
                    gate.wait();
                })
                .unwrap()
        };
        let threads: Vec<_> = (0..u64::from(MAX_THREADS) + 20).map(spawn).collect();
        // The end of the scope waits for what they do, and not for their numbers to go back.
        for thread in threads {
            thread.join().unwrap();
        }
    });
}

#[test]
fn large_vectors_grow_and_shrink() {
    let mut numbers: Vec<u64> = Vec::new();
    for n in 0..4_000_000 {
        numbers.push(n);
    }
    assert!(numbers.iter().enumerate().all(|(at, &n)| at as u64 == n));
    numbers.truncate(1000);
    numbers.shrink_to_fit();
    assert_eq!(numbers.iter().sum::<u64>(), 499_500);
    let zeroes = vec![0u8; 40 << 20];
    assert!(zeroes.iter().all(|&byte| byte == 0));
}
