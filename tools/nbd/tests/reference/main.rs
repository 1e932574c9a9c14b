//! The same command lines on our program and on qemu-nbd, with nbdinfo, nbdcopy and qemu-io as clients: the same
//! output, exit status and disk.

#[path = "../../../io/tests/reference/script.rs"]
mod script;

const NEEDED: [&str; 6] = ["qemu-img", "qemu-io", "qemu-nbd", "nbdinfo", "nbdcopy", "nbdkit"];

#[test]
fn command_lines() {
    if script::has(&NEEDED) {
        script::run(include_str!("../scripts/command_lines.txt"), "qemu-nbd", &script::example("qemu-nbd"));
    }
}

#[test]
fn serving() {
    if script::has(&NEEDED) {
        script::run(include_str!("../scripts/serving.txt"), "qemu-nbd", &script::example("qemu-nbd"));
    }
}

#[test]
fn listing() {
    if script::has(&NEEDED) {
        script::run(include_str!("../scripts/listing.txt"), "qemu-nbd", &script::example("qemu-nbd"));
    }
}

/// The same requests of a client leave the same disk, and the server tells the same about it.
#[test]
fn random_requests() {
    if !script::has(&NEEDED) {
        return;
    }
    let images = ["-f raw a.raw 4M", "-f qcow2 a.qcow2 4M", "-f qcow2 -b base.qcow2 -F qcow2 a.qcow2 4M"];
    let mut lines = String::new();
    for (number, image) in images.into_iter().enumerate() {
        let mut numbers = script::Numbers(number as u64 + 100);
        let commands: Vec<_> = (0..60).map(|_| numbers.command(4 << 20)).collect();
        let (format, name) = if image.contains("a.raw") { ("raw", "a.raw") } else { ("qcow2", "a.qcow2") };
        lines += &format!(
            "\n= {image}\n\
             $ qemu-img create -q -f qcow2 base.qcow2 3M\n\
             $ qemu-io -c 'write -P 17 0 3M' -c 'discard 1M 64k' base.qcow2\n\
             $ qemu-img create -q {image}\n\
             serve -f {format} --discard=unmap {name}; \
             printf '{}\\nmap\\nquit' | qemu-io -d unmap -f raw \"nbd+unix:///?socket=$PWD/s\"; over\n",
            commands.join("\\n").replace('\n', "\\n")
        );
        // Of clusters that are partly written the two leave different parts as holes in the file.
        if format == "raw" {
            lines += "serve -f raw a.raw; nbdinfo --map \"nbd+unix:///?socket=$PWD/s\"; over\n";
        }
    }
    script::run(&lines, "qemu-nbd", &script::example("qemu-nbd"));
}
