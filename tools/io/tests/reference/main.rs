//! The same command lines and commands on our program and on qemu-io: the same output, exit status and disk.

mod script;

#[test]
fn commands() {
    if script::has(&["qemu-img", "qemu-io"]) {
        script::run(include_str!("../scripts/commands.txt"), "qemu-io", &script::example("qemu-io"));
    }
}

#[test]
fn command_lines() {
    if script::has(&["qemu-img", "qemu-io"]) {
        script::run(include_str!("../scripts/command_lines.txt"), "qemu-io", &script::example("qemu-io"));
    }
}

#[test]
fn images() {
    if script::has(&["qemu-img", "qemu-io"]) {
        script::run(include_str!("../scripts/images.txt"), "qemu-io", &script::example("qemu-io"));
    }
}

/// The same requests leave the same disk and the same bitmaps, whatever the image looks like inside.
#[test]
fn random_commands() {
    if !script::has(&["qemu-img", "qemu-io", "qemu-storage-daemon"]) {
        return;
    }
    const SIZE: u64 = 4 << 20;
    let images = [
        "-f raw a.raw 4M",
        "-f qcow2 a.qcow2 4M",
        "-f qcow2 -o cluster_size=512 a.qcow2 4M",
        "-f qcow2 -o cluster_size=2M,refcount_bits=1 a.qcow2 4M",
        "-f qcow2 -o extended_l2=on a.qcow2 4M",
        "-f qcow2 -o compat=0.10 a.qcow2 4M",
        "-f qcow2 -b base.qcow2 -F qcow2 a.qcow2 4M",
        "-f qcow2 -o extended_l2=on,cluster_size=16k -b base.qcow2 -F qcow2 a.qcow2 4M",
    ];
    let mut lines = String::new();
    for (number, image) in images.into_iter().enumerate() {
        let mut numbers = script::Numbers(number as u64 + 1);
        let commands: Vec<_> = (0..60).map(|_| numbers.command(SIZE)).collect();
        let (format, name) = if image.contains("a.raw") { ("raw", "a.raw") } else { ("qcow2", "a.qcow2") };
        let keeps_bitmaps = format == "qcow2" && !image.contains("compat=0.10");
        let [make, look] = match keeps_bitmaps {
            true => [
                "for size in 512 4k 1M; do qemu-img bitmap --add -g $size a.qcow2 $size; done",
                "said a.qcow2",
            ],
            false => ["true"; 2],
        };
        lines += &format!(
            "\n= {image}\n\
             $ qemu-img create -q -f qcow2 base.qcow2 3M\n\
             $ qemu-io -c 'write -P 17 0 3M' -c 'discard 1M 64k' base.qcow2\n\
             $ qemu-img create -q {image}\n\
             $ {make}\n\
             printf '{}\\nmap\\nquit' | qemu-io -f {format} {name}\n\
             qemu-img check -f {format} {name} 2>&1 | grep -v offset | cut -d , -f 1\n\
             % {look}\n",
            commands.join("\\n").replace('\n', "\\n")
        );
    }
    script::run(&lines, "qemu-io", &script::example("qemu-io"));
}
