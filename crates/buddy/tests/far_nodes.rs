//! Nodes: CPUs of nodes without memory, and of which node ranges and pressure are.

mod common;

use std::cell::RefCell;
use std::collections::BTreeSet;

use common::machine::{MIB, map, map_of_nodes, one_zone, start_on};
use common::played::{MANY, become_cpu};
use common::window::Window;
use kmem_buddy::Buddy;
use kmem_hal::{
    CpuId, FrameRequest, FrameSink, FrameSource, NoCpuCall, NodeId, NodePolicy, Order, PhysAddr,
    Pressure, PressureLevel, Spin,
};

/// Nodes without memory may have numbers beyond those with: their CPUs, at boot and later, are served by the nearest node.
#[test]
fn a_cpu_of_a_node_without_memory_asks_the_nearest_one() {
    const NODE: u64 = 32 * MIB;
    let window = Window::new(3 * NODE, 3 * NODE);
    let mut map = map_of_nodes(3, NODE);
    let config = one_zone()
        .cpus(2)
        .cpu_node(|cpu| NodeId::new([7, u16::MAX, 9][cpu.index()]))
        .distance(|from, to| match (from.get(), to.get()) {
            (7, 1) | (9, 2) => 15,
            (from, to) if from == to => 10,
            _ => 40,
        });
    let buddy = start_on(MANY, &window, &mut map, &config);
    let total = buddy.mem_info().free;
    let order9 = FrameRequest::new(Order::HUGE_2M);
    for (cpu, node) in [(0, 1), (1, 0), (2, 2)] {
        become_cpu(cpu);
        buddy.cpu_online(CpuId::new(cpu)).unwrap();
        let nearest = buddy.node_of_cpu(CpuId::new(cpu));
        assert_eq!(u64::from(nearest.get()), node);
        for request in [FrameRequest::ONE, FrameRequest::ONE.movable(), order9] {
            let frame = buddy.alloc(&request).unwrap();
            assert_eq!(frame.first().number() / (NODE >> 12), node, "CPU {cpu}");
            assert_eq!(buddy.node_of_frame(frame.first()), nearest);
            buddy.free(frame);
        }
        let range = buddy
            .alloc_range(3, Order::ZERO, &FrameRequest::ONE)
            .unwrap();
        assert_eq!(range.range().first().number() / (NODE >> 12), node);
        buddy.free_range(range).unwrap();
        buddy.drain_local();
    }
    // The third CPU's area.
    assert!(total - buddy.mem_info().free <= 8);
    become_cpu(0);
}

/// The number of a node without memory may lie between those with.
#[test]
fn a_cpu_of_a_node_without_memory_between_others_is_near_to_what_it_is_given() {
    const NODE: u64 = 32 * MIB;
    let window = Window::new(2 * NODE, 2 * NODE);
    let mut map = map(&[(0, 2 * NODE)]);
    for (at, node) in [(0, 0), (1, 2)] {
        map.assign_node(PhysAddr::new(at * NODE), NODE, NodeId::new(node))
            .unwrap();
    }
    let config = one_zone()
        .cpus(3)
        .cpu_node(|cpu| NodeId::new(cpu.get() as u16))
        .distance(|from, to| match (from.get(), to.get()) {
            (1, 2) => 15,
            (from, to) if from == to => 10,
            _ => 40,
        });
    let buddy = start_on(MANY, &window, &mut map, &config);
    for (cpu, node) in [(0, 0), (1, 2), (2, 2)] {
        become_cpu(cpu);
        let frame = buddy.alloc(&FrameRequest::ONE).unwrap();
        assert_eq!(buddy.node_of_frame(frame.first()), NodeId::new(node));
        assert_eq!(buddy.node_of_cpu(CpuId::new(cpu)), NodeId::new(node));
        buddy.free(frame);
    }
    become_cpu(0);
}

/// Notes of which nodes it was told that memory is short.
#[derive(Default)]
struct Told(RefCell<BTreeSet<NodeId>>);

impl Pressure for &Told {
    fn pressure(&self, node: NodeId, _level: PressureLevel, _request: &FrameRequest) -> bool {
        self.0.borrow_mut().insert(node);
        false
    }
}

/// What is above the top order, ranges, and what is told of short memory: all are of the node that the request is for.
#[test]
fn ranges_and_pressure_are_of_the_node_that_is_asked_for() {
    const NODE: u64 = 32 * MIB;
    let window = Window::new(3 * NODE, 3 * NODE);
    let mut map = map_of_nodes(3, NODE);
    let told = Told::default();
    let buddy: Buddy<_, _, Spin, _, _> = Buddy::with(&window, MANY, NoCpuCall, &told);
    let config = one_zone()
        .cpus(2)
        .cpu_node(|cpu| NodeId::new(cpu.get() as u16));
    // SAFETY: X1: the test's own memory, which only this allocator has.
    unsafe { buddy.init(&mut map, &config) }.unwrap();
    become_cpu(1);
    let huge = FrameRequest::new(Order::new(11).unwrap());
    for (policy, node) in [
        (NodePolicy::Local, 1),
        (NodePolicy::Preferred(NodeId::new(2)), 2),
        (NodePolicy::Preferred(NodeId::new(0)), 0),
        (NodePolicy::Strict(NodeId::new(2)), 2),
    ] {
        let block = buddy.alloc(&huge.node(policy)).unwrap();
        assert_eq!(block.first().number() / (NODE >> 12), node, "{policy:?}");
        buddy.free(block);
        let request = FrameRequest::ONE.node(policy);
        let range = buddy.alloc_range(1500, Order::ZERO, &request).unwrap();
        assert_eq!(range.range().first().number() / (NODE >> 12), node);
        buddy.free_range(range).unwrap();
    }
    let mut held = Vec::new();
    for (policy, node) in [
        (NodePolicy::Strict(NodeId::new(2)), 2),
        (NodePolicy::Local, 1),
    ] {
        let request = FrameRequest::ONE.node(policy);
        held.extend(std::iter::from_fn(|| buddy.alloc(&request).ok()));
        let nodes = std::mem::take(&mut *told.0.borrow_mut());
        assert_eq!(Vec::from_iter(nodes), [NodeId::new(node)], "{policy:?}");
    }
    buddy.free_batch(&mut || held.pop());
    buddy.check().unwrap();
    become_cpu(0);
}
