// Single situations that a random run meets rarely, each on a machine that forgets nothing. The list is at the end; each situation stands
// with those of its kind.

mod absent;
mod bits;
mod flushes;
mod gathers;
mod held;
mod huge;
mod memory;
mod room;
mod sharing;
mod tables;
mod waits;

use kmem_hal::{OwnedFrame, Page, PageRange};
use kmem_paging::PageTable;
use kmem_paging::format::X86_64;

use super::hostile_env::HostileEnv;

type Table = PageTable<X86_64, &'static HostileEnv, OwnedFrame>;

fn at(page: u64) -> Page {
    Page::new(page).unwrap()
}

fn pages(first: u64, count: u64) -> PageRange {
    PageRange::with_count(at(first), count).unwrap()
}

/// Every situation.
pub const ALL: &[(&str, fn())] = &[
    (
        "bits set meanwhile are kept",
        bits::bits_set_meanwhile_are_kept,
    ),
    (
        "a reserve outlives its neighbours",
        memory::a_reserve_outlives_its_neighbours,
    ),
    (
        "a reserve is not too large",
        memory::a_reserve_is_not_too_large,
    ),
    (
        "a moved frame outlives its old page",
        gathers::a_moved_frame_outlives_its_old_page,
    ),
    (
        "a forgotten gather is only a leak",
        gathers::a_forgotten_gather_is_only_a_leak,
    ),
    (
        "wide changes are flushed to their ends",
        flushes::wide_changes_are_flushed_to_their_ends,
    ),
    (
        "a huge and a small leaf are both flushed",
        flushes::a_huge_and_a_small_leaf_are_both_flushed,
    ),
    (
        "a gigabyte is cut down to a page",
        huge::a_gigabyte_is_cut_down_to_a_page,
    ),
    (
        "a moved page is there though absence is cached",
        absent::a_moved_page_is_there_though_absence_is_cached,
    ),
    (
        "a replaced page is there though absence is cached",
        absent::a_replaced_page_is_there_though_absence_is_cached,
    ),
    (
        "a shared table is not merged",
        sharing::a_shared_table_is_not_merged,
    ),
    (
        "a table with pins is not merged",
        sharing::a_table_with_pins_is_not_merged,
    ),
    (
        "global pages of a shared table are flushed",
        sharing::global_pages_of_a_shared_table_are_flushed,
    ),
    (
        "tables below a shared one are counted",
        sharing::tables_below_a_shared_one_are_counted,
    ),
    (
        "what a copy leaves out is flushed",
        sharing::what_a_copy_leaves_out_is_flushed,
    ),
    (
        "a fork cuts huge leaves at its ends",
        sharing::a_fork_cuts_huge_leaves_at_its_ends,
    ),
    (
        "a table built below the top is in both roots",
        sharing::a_table_built_below_the_top_is_in_both_roots,
    ),
    (
        "a merge joins what its parts knew",
        huge::a_merge_joins_what_its_parts_knew,
    ),
    (
        "one interrupt for each CPU that has the space",
        flushes::one_interrupt_for_each_cpu_that_has_the_space,
    ),
    (
        "single pages of one gather are all flushed",
        flushes::single_pages_of_one_gather_are_all_flushed,
    ),
    (
        "a page that becomes global is flushed",
        flushes::a_page_that_becomes_global_is_flushed,
    ),
    ("a page in each table", held::a_page_in_each_table),
    (
        "a change from outside is nobody else's",
        gathers::a_change_from_outside_is_nobody_elses,
    ),
    (
        "a loaded table keeps its tag",
        gathers::a_loaded_table_keeps_its_tag,
    ),
    (
        "a new table waits for emptied ones",
        memory::a_new_table_waits_for_emptied_ones,
    ),
    (
        "a gather in place is committed",
        gathers::a_gather_in_place_is_committed,
    ),
    (
        "a payload of a wider format is refused",
        tables::a_payload_of_a_wider_format_is_refused,
    ),
    (
        "absent words name no memory",
        tables::absent_words_name_no_memory,
    ),
    ("a table starts empty", tables::a_table_starts_empty),
    ("what was lent stays lent", tables::what_was_lent_stays_lent),
    ("a lent leaf table stays", tables::a_lent_leaf_table_stays),
    (
        "global pages go with a wide flush",
        flushes::global_pages_go_with_a_wide_flush,
    ),
    (
        "a held cursor does all that others do",
        held::a_held_cursor_does_all_that_others_do,
    ),
    (
        "a locked entry does all that a cursor does",
        held::a_locked_entry_does_all_that_a_cursor_does,
    ),
    (
        "a table built in part is empty behind",
        tables::a_table_built_in_part_is_empty_behind,
    ),
    (
        "a table of payloads is flushed before it is freed",
        flushes::a_table_of_payloads_is_flushed_before_it_is_freed,
    ),
    (
        "a commit beside a waiting cursor ends",
        waits::a_commit_beside_a_waiting_cursor_ends,
    ),
    (
        "a merge wants frames in order",
        huge::a_merge_wants_frames_in_order,
    ),
    (
        "a move without memory moves nothing",
        memory::a_move_without_memory_moves_nothing,
    ),
    (
        "a fork without memory changes nothing",
        memory::a_fork_without_memory_changes_nothing,
    ),
    (
        "a write during a merge is kept",
        huge::a_write_during_a_merge_is_kept,
    ),
    (
        "a merge of global parts is flushed",
        huge::a_merge_of_global_parts_is_flushed,
    ),
    (
        "what the cache keeps is empty",
        tables::what_the_cache_keeps_is_empty,
    ),
];
