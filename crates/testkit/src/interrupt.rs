//! An interrupt at every step of an operation (build with `--cfg kmem_counting`).
//!
//! Fast paths of kmem run with interrupts on: whatever enters the same code on the same CPU must find a way around what it
//! interrupted. [`every_interrupt`] puts that to the test without a scheduler: it runs an operation again and again, with
//! an interrupt before its first access to a word of the sync facade, before the second, and so on.
//!
//! Source of the contract: `C2` of [`kmem_hal::Cpu`].

use kmem_hal::sync::with_interrupt;

/// Runs `operation(world)` with `interrupt(world)` before its first step, its second, ... each time in a new world of
/// `setup`, and `check(world, step)` afterwards; ends after the run in which the interrupt did not come. Gives the number of
/// steps.
///
/// # Examples
///
/// ```
/// use kmem_hal::sync::LocalU64;
/// use kmem_testkit::interrupt::every_interrupt;
///
/// // An interrupt that leaves the word as it found it is harmless everywhere.
/// let steps = every_interrupt(
///     || LocalU64::new(0),
///     |word| word.set(word.get() + 1),
///     |word| {
///         word.set(word.get() + 1);
///         word.set(word.get() - 1);
///     },
///     |word, _step| assert_eq!(word.get(), 1),
/// );
/// assert_eq!(steps, 2);
/// ```
///
/// # Panics
///
/// After 100,000 steps: the operation then never ends.
pub fn every_interrupt<W>(
    mut setup: impl FnMut() -> W,
    operation: impl Fn(&W),
    interrupt: impl Fn(&W),
    check: impl Fn(&W, u64),
) -> u64 {
    for step in 1..=100_000 {
        let world = setup();
        let ((), fired) = with_interrupt(step, &mut || interrupt(&world), || operation(&world));
        check(&world, step);
        if !fired {
            return step - 1;
        }
    }
    panic!("100000 steps, and the operation has not ended");
}
