//! The security and pitfall list of docs/pitfalls.md, as far as it is about address spaces: each entry a named run.
//!
//! That each notices when its guard is gone is shown by `tests/mutants.rs`.

mod common;
#[path = "regressions/device.rs"]
mod device;
#[path = "regressions/list.rs"]
mod list;
#[path = "regressions/pins.rs"]
mod pins;
#[path = "regressions/swap.rs"]
mod swap;

fn entries() -> impl Iterator<Item = &'static list::Regression> {
    let parts = [list::ALL, swap::ALL, device::ALL, pins::ALL];
    parts.into_iter().flatten()
}

macro_rules! regressions {
    ($($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                let (_, run, _) = entries().find(|entry| entry.0 == stringify!($name)).unwrap();
                run();
            }
        )*

        #[test]
        fn every_entry_of_the_list_is_a_test() {
            let tests = [$(stringify!($name)),*];
            assert!(entries().all(|entry| tests.contains(&entry.0)));
        }
    };
}

regressions! {
    accesses_reach_the_device_uncached
    device_memory_is_nobodys_page
    device_memory_over_fork_and_in_shared_tables
    calls_on_device_memory_answer_as_linux
    a_device_is_mapped_within_its_end_and_never_copied
    a_page_comes_back_from_swap_as_it_went
    a_copied_entry_of_swap_is_counted
    a_failed_read_is_no_page
    an_entry_in_a_shared_table_is_flushed_for_all
    no_dirty_bit_is_lost_by_write_back
    what_is_written_after_madv_free_stays
    what_the_kernel_writes_after_madv_free_stays
    what_a_pin_writes_after_madv_free_stays
    locked_memory_is_not_reclaimed
    a_moved_page_takes_its_bytes_along
    an_entry_of_swap_names_no_memory
    reuse_while_another_reference_exists
    a_shared_page_is_not_exclusive
    a_chain_of_forks_each_writes_its_own
    the_parents_processors_may_not_write_after_fork
    frames_are_free_only_after_every_processor_has_flushed
    a_private_write_does_not_reach_the_file
    a_later_write_reaches_the_file_too
    a_child_of_locked_memory_is_not_locked
    the_zero_page_is_nobodys
    a_copied_page_is_anonymous_and_no_file_page
    addresses_at_the_top_are_refused
    a_stack_grows_into_no_guard
    nothing_gets_into_the_first_pages
    a_mapping_is_cut_where_there_may_be_more
    protection_outlives_a_page_that_is_absent
    counts_are_refused_before_they_wrap
    an_absent_entry_names_no_memory_that_exists
    a_child_with_a_read_pin_does_not_see_what_its_parent_writes_later
    a_pinned_page_stays_its_owners_over_fork
    a_pin_in_a_shared_table_makes_the_table_the_pinners
    a_pinned_page_that_moved_stays_its_owners
    a_write_through_a_pin_never_reaches_the_file_of_a_private_mapping
    what_a_program_may_not_access_is_not_pinned
    a_read_pin_of_a_read_only_shared_mapping_is_of_the_files_page
    a_thousand_references_are_no_pin
}
