//! The program by itself, for tests that run it beside the reference.

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    underlay_sys::process::survive_long_files();
    std::process::exit(underlay_img::main("qemu-img", &words));
}
