//! Reference models, operation enums, failure injection and a conformance suite for kmem and its users.
