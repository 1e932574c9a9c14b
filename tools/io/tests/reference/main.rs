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

/// A few numbers that look random and are always the same.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }

    /// A command on a disk of this many bytes.
    fn command(&mut self, size: u64) -> String {
        let unit = match self.below(4) {
            0 => 1,
            1 => 512,
            2 => 4096,
            _ => 65536,
        };
        let at = self.below(size / unit) * unit;
        let length = (self.below(12) + 1) * unit;
        let length = length.min(size - at);
        let byte = self.below(256);
        match self.below(12) {
            0..4 => format!("write -P {byte} {at} {length}"),
            4 => format!("write -z {at} {length}"),
            5 => format!("write -zu {at} {length}"),
            6 => format!("discard {at} {length}"),
            7 => format!("writev -P {byte} {at} {} {length}", length.min(size - at - length)),
            8 => format!("aio_write -P {byte} {at} {length}\naio_flush"),
            9 => format!("alloc {at} {length}"),
            10 => format!("read -v {at} {}", length.min(64)),
            _ => "flush".to_owned(),
        }
    }
}

/// The same requests leave the same disk, whatever the image looks like inside.
#[test]
fn random_commands() {
    if !script::has(&["qemu-img", "qemu-io"]) {
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
        let mut numbers = Numbers(number as u64 + 1);
        let commands: Vec<_> = (0..60).map(|_| numbers.command(SIZE)).collect();
        let (format, name) = if image.contains("a.raw") { ("raw", "a.raw") } else { ("qcow2", "a.qcow2") };
        lines += &format!(
            "\n= {image}\n\
             $ qemu-img create -q -f qcow2 base.qcow2 3M\n\
             $ qemu-io -c 'write -P 17 0 3M' -c 'discard 1M 64k' base.qcow2\n\
             $ qemu-img create -q {image}\n\
             printf '{}\\nmap\\nquit' | qemu-io -f {format} {name}\n\
             qemu-img check -f {format} {name} 2>&1 | grep -v offset | cut -d , -f 1\n",
            commands.join("\\n").replace('\n', "\\n")
        );
    }
    script::run(&lines, "qemu-io", &script::example("qemu-io"));
}
