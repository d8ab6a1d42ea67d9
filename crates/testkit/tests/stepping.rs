//! The single-stepper finds what it is for: planted bugs of each kind, and nothing where there is none.
#![cfg(all(
    target_os = "linux",
    target_arch = "x86_64",
    not(any(loom, shuttle, miri))
))]

use std::cell::Cell;
use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};

use kmem_testkit::step::{StepError, StepFailure, Stepper, Steps};

/// A stack of numbers as an allocator's array is one: a count and slots, in plain words.
struct Stack {
    busy: Cell<bool>,
    count: Cell<usize>,
    slots: [Cell<u32>; 16],
    /// What the operation popped.
    mine: Cell<u32>,
    /// What the interrupts popped and kept.
    theirs: Cell<u32>,
    guarded: bool,
}

impl Stack {
    fn new(guarded: bool) -> Self {
        Self {
            busy: Cell::new(false),
            count: Cell::new(16),
            slots: std::array::from_fn(|slot| Cell::new(1 << slot)),
            mine: Cell::new(0),
            theirs: Cell::new(0),
            guarded,
        }
    }

    fn pop(&self) -> Option<u32> {
        if self.guarded && self.busy.get() {
            return None;
        }
        self.busy.set(black_box(true));
        let count = black_box(self.count.get()).checked_sub(1);
        // An interrupt here pops the same slot, unless it saw `busy`.
        let popped = count.map(|count| {
            let value = self.slots[count].get();
            self.count.set(black_box(count));
            value
        });
        self.busy.set(black_box(false));
        popped
    }
}

fn pop_under_interrupts(guarded: bool, stepper: Stepper) -> Result<Option<Steps>, StepFailure> {
    stepper.run(
        || Stack::new(guarded),
        |stack| stack.mine.set(stack.pop().unwrap()),
        |stack| {
            // One interrupt keeps what it gets, so that a number that is given twice shows.
            if stack.theirs.get() == 0 {
                stack.theirs.set(stack.pop().unwrap_or(0));
            }
        },
        |stack| {
            let (mine, theirs) = (stack.mine.get(), stack.theirs.get());
            let left: u32 = (0..stack.count.get()).map(|at| stack.slots[at].get()).sum();
            assert_eq!(mine & theirs, 0, "popped twice");
            assert_eq!(mine + theirs + left, 0xffff, "lost");
        },
    )
}

#[test]
fn a_pop_that_cannot_be_entered_again_is_found() {
    match pop_under_interrupts(false, Stepper::alone()) {
        Ok(None) => {}
        Err(StepFailure {
            step,
            offset,
            error: StepError::Panicked(what),
        }) => {
            assert!(step > 1 && offset > 0, "{step} {offset:#x}");
            assert!(
                what.contains("popped twice") || what.contains("lost"),
                "{what}"
            );
        }
        other => panic!("not found: {other:?}"),
    }
}

#[test]
fn a_pop_behind_a_busy_flag_is_right_at_every_instruction() {
    for stepper in [Stepper::alone(), Stepper::together()] {
        let steps =
            pop_under_interrupts(true, stepper).unwrap_or_else(|failure| panic!("{failure}"));
        assert!(
            steps.is_none_or(|steps| steps.instructions > 10),
            "{steps:?}"
        );
    }
}

fn under_address_sanitizer() -> bool {
    std::env::var_os("ASAN_OPTIONS").is_some()
}

#[test]
fn who_spins_on_what_he_interrupted_is_found() {
    // Under AddressSanitizer a copy of the process is made at few instructions only, and the two here may be missed.
    let alone = (!under_address_sanitizer()).then(Stepper::alone);
    for stepper in alone.into_iter().chain([Stepper::together()]) {
        let result = stepper.run(
            || AtomicBool::new(false),
            |lock| {
                lock.store(true, Ordering::Relaxed);
                lock.store(false, Ordering::Relaxed);
            },
            |lock| {
                while lock.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            },
            |_| {},
        );
        match result {
            Ok(None) => {}
            Err(failure) => assert_eq!(failure.error, StepError::Spun),
            Ok(steps) => panic!("not found: {steps:?}"),
        }
    }
}

#[test]
fn what_goes_wrong_is_told_apart() {
    let wrong_access = Stepper::together().run(
        || (),
        |()| {
            // SAFETY: none: the wrong access is what is tested.
            unsafe { black_box(std::ptr::without_provenance::<u8>(8)).read_volatile() };
        },
        |()| {},
        |()| {},
    );
    let endless =
        Stepper::together()
            .limit(1000)
            .run(|| (), |()| while black_box(true) {}, |()| {}, |()| {});
    let wrong_check = Stepper::together().run(|| 7, |_| {}, |_| {}, |&seven| assert_eq!(seven, 8));
    // AddressSanitizer's own handler ends the process in another way.
    let signal =
        (!under_address_sanitizer()).then_some((wrong_access, StepError::Signal(libc::SIGSEGV)));
    for (result, expected) in signal.into_iter().chain([(endless, StepError::TooLong)]) {
        match result {
            Ok(None) => {}
            Err(failure) => assert_eq!(failure.error, expected),
            Ok(steps) => panic!("{steps:?}, not {expected:?}"),
        }
    }
    match wrong_check {
        Ok(None) => {}
        Err(failure) => assert!(failure.to_string().contains("stepping.rs"), "{failure}"),
        Ok(steps) => panic!("{steps:?}"),
    }
}

/// Registers, flags, vector registers and `errno` of the operation are as they were, whatever the interrupt does.
#[test]
fn the_operation_does_not_feel_the_interrupt() {
    let sum = |seed: u64| -> (f64, Vec<u8>) {
        let mut bytes = vec![seed as u8; 300];
        bytes.copy_within(7..290, 9);
        bytes[17] = 3;
        let sum = (0..20)
            .map(|at| f64::from(at as u32) / (seed as f64 + 3.0))
            .sum();
        (sum, bytes)
    };
    let steps = Stepper::together()
        .run(
            || Cell::new((0.0, Vec::new())),
            |result| result.set(sum(black_box(1))),
            |_| {
                let mut bytes = [0xee_u8; 300];
                black_box(&mut bytes).copy_within(1..200, 50);
                black_box((1.5_f64 / f64::from(black_box(bytes[3]))).sqrt());
                // SAFETY: the thread's own word.
                unsafe { *libc::__errno_location() = 77 };
            },
            |result| assert_eq!(result.take(), sum(black_box(1))),
        )
        .unwrap_or_else(|failure| panic!("{failure}"));
    assert!(
        steps.is_none_or(|steps| steps.instructions > 100),
        "{steps:?}"
    );
}
