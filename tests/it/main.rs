//! Everything that needs a real kernel, a real registry or more than one room.

mod architecture;
mod erofs_reader;
mod erofs_writer;
