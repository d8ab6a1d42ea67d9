//! What is drawn and printed of a tree.

mod common;

use common::{Heap, Tree, fill, pages};

#[test]
fn views_are_well_formed() {
    let heap = Heap::default();
    let mut tree = Tree::new_in(&heap);
    fill(&mut tree, 0..40);
    let dump = tree.dump().to_string();
    assert_eq!(dump.lines().filter(|line| line.contains("->")).count(), 40);
    assert!(dump.starts_with("inner 0x0..=0xfffffffffffff"), "{dump}");
    let layout = tree.layout_svg(pages(0, 200)).to_string();
    assert_eq!(layout.matches("<title>").count(), 40);
    let nodes = tree.nodes_svg().to_string();
    let stats = tree.stats();
    assert_eq!(nodes.matches("<title>").count(), stats.leaves + stats.inner);
    for svg in [layout, nodes] {
        assert!(svg.starts_with("<svg ") && svg.trim_end().ends_with("</svg>"));
        assert_eq!(
            svg.matches("<rect").count(),
            svg.matches("</rect>").count() + svg.matches("height=\"30\" fill=\"#eee\"/>").count()
        );
    }
    assert!(stats.to_string().contains("leaf fill"));
}

/// In a picture of the nodes those of each level cover the whole width, side by side: each is as wide as its leaves.
#[test]
fn each_level_of_a_picture_is_as_wide_as_the_other() {
    let heap = Heap::default();
    let mut tree = Tree::new_in(&heap);
    fill(&mut tree, 0..1500);
    let (stats, svg) = (tree.stats(), tree.nodes_svg().to_string());
    assert_eq!(stats.height, 3);
    let number = |line: &str, name: &str| -> u64 {
        let (_, rest) = line.split_once(name).unwrap();
        rest.split_once('"').unwrap().0.parse().unwrap()
    };
    for level in 0..stats.height {
        let top = format!(" y=\"{}\"", 40 * level);
        let (mut end, mut nodes) = (0, 0);
        for line in svg.lines().filter(|line| line.contains(&top)) {
            assert_eq!(number(line, "x=\""), end, "{line}");
            end += number(line, " width=\"");
            nodes += 1;
        }
        assert_eq!(end, 1000, "level {level} of {nodes} nodes");
    }
}
