//! The program by itself, for tests that run it beside the reference.

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    std::process::exit(underlay_nbd_server::main("qemu-nbd", &words));
}
