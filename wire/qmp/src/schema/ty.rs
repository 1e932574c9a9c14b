//! The vocabulary of the description: QAPI's kinds of types.

/// A type of a value.
#[derive(Clone, Copy, Debug)]
pub enum Type {
    /// A text.
    Str,
    /// A whole number.
    Int,
    /// A whole number from 0 to the largest of 16 bits.
    U16,
    /// A whole number from 0 to the largest of 32 bits.
    U32,
    /// A whole number of 64 bits, with or without a sign: the reference takes both for it.
    U64,
    /// true or false
    Bool,
    /// Any number.
    Number,
    /// null
    Null,
    /// Anything.
    Any,
    /// One of some words.
    Enum(&'static Enum),
    /// An object.
    Object(&'static Object),
    /// One of several types, told apart by the kind of JSON value.
    Alternate(&'static Alternate),
    /// A list.
    List(&'static Type),
}

/// One of some words.
#[derive(Debug)]
pub struct Enum {
    /// The words.
    pub values: &'static [&'static str],
}

/// An object; with a tag, more members come in by the value of the tag (QAPI's flat union).
#[derive(Debug)]
pub struct Object {
    /// Members that it always may have.
    pub members: &'static [Member],
    /// The member whose value decides on the case.
    pub tag: Option<&'static str>,
    /// Members that come in for a value of the tag.
    pub cases: &'static [(&'static str, &'static Object)],
}

/// A member of an object.
#[derive(Debug)]
pub struct Member {
    /// Its name.
    pub name: &'static str,
    /// Its type.
    pub ty: Type,
    /// It may be left out.
    pub optional: bool,
}

/// One of several types.
#[derive(Debug)]
pub struct Alternate {
    /// What messages call it.
    pub name: &'static str,
    /// The types.
    pub choices: &'static [Type],
}

/// A command.
#[derive(Debug)]
pub struct Command {
    /// Its name.
    pub name: &'static str,
    /// Its arguments.
    pub arguments: &'static Object,
    /// What it answers.
    pub returns: Type,
}

/// An event.
#[derive(Debug)]
pub struct Event {
    /// Its name.
    pub name: &'static str,
    /// Its data.
    pub data: &'static Object,
}

pub(super) const fn req(name: &'static str, ty: Type) -> Member {
    Member { name, ty, optional: false }
}

pub(super) const fn opt(name: &'static str, ty: Type) -> Member {
    Member { name, ty, optional: true }
}
