//! The commands of the human monitor: their names, arguments and help texts, which are QEMU's.
//!
//! `arguments` describes what follows a command, in QEMU's short hand: `name:type`, separated by commas. Types:
//!
//! | type | what is typed |
//! |---|---|
//! | `B`, `F`, `s` | a word, or text in double quotes: a device, a file name, anything |
//! | `S` | the rest of the line |
//! | `O` | a list of options, or nothing |
//! | `l` | a number, or a sum of numbers |
//! | `o` | a size in MiB, or with a suffix |
//! | `p` | the same, or nothing if what is there is no size |
//! | `-x` | the flag `-x` |
//!
//! With `?` behind it an argument may be left out.

/// One command.
#[derive(Debug)]
pub struct Line {
    /// What it is called, with its short forms behind bars.
    pub names: &'static str,
    /// What follows it.
    pub arguments: &'static str,
    /// The same for people.
    pub parameters: &'static str,
    /// What it does.
    pub help: &'static str,
}

impl Line {
    /// Its first name.
    pub fn name(&self) -> &'static str {
        self.names.split('|').next().unwrap_or_default()
    }

    /// Whether it is called so.
    pub fn is(&self, name: &str) -> bool {
        self.names.split('|').any(|own| own == name)
    }

    /// What `help` shows; `prefix` comes before its name.
    pub fn describe(&self, prefix: &str) -> String {
        format!("{prefix}{} {} -- {}\n", self.names, self.parameters, self.help)
    }
}

const fn line(
    names: &'static str,
    arguments: &'static str,
    parameters: &'static str,
    help: &'static str,
) -> Line {
    Line { names, arguments, parameters, help }
}

/// All commands, in the order in which `help` lists them.
pub static COMMANDS: &[Line] = &[
    line(
        "block_job_cancel",
        "force:-f,device:B",
        "[-f] device",
        "stop an active background block operation (use -f\n\
         \t\t\t if you want to abort the operation immediately\n\
         \t\t\t instead of keep running until data is in sync)",
    ),
    line("block_job_complete", "device:B", "device", "stop an active background block operation"),
    line("block_job_pause", "device:B", "device", "pause an active background block operation"),
    line("block_job_resume", "device:B", "device", "resume a paused background block operation"),
    line(
        "block_job_set_speed",
        "device:B,speed:o",
        "device speed",
        "set maximum speed for a background block operation",
    ),
    line("block_resize", "device:B,size:o", "device size", "resize a block image"),
    line(
        "block_set_io_throttle",
        "device:B,bps:l,bps_rd:l,bps_wr:l,iops:l,iops_rd:l,iops_wr:l",
        "device bps bps_rd bps_wr iops iops_rd iops_wr",
        "change I/O throttle limits for a block drive",
    ),
    line(
        "block_stream",
        "device:B,speed:p?,base:s?",
        "device [speed [base]]",
        "copy data from a backing file into a block device",
    ),
    line(
        "change",
        "device:B,force:-f,target:F,arg:s?,read-only-mode:s?",
        "device [-f] filename [format [read-only-mode]]",
        "change a removable medium, optional format, use -f to force the operation",
    ),
    line(
        "commit",
        "device:B",
        "device|all",
        "commit changes to the disk images (if -snapshot is used) or backing files",
    ),
    line("cont|c", "", "", "resume emulation"),
    line(
        "device_add",
        "device:O",
        "driver[,prop=value][,...]",
        "add device, like -device on the command line",
    ),
    line("device_del", "id:s", "device", "remove device"),
    line(
        "drive_add",
        "node:-n,pci_addr:s,opts:s",
        "[-n] [[<domain>:]<bus>:]<slot>\n\
         [file=file][,if=type][,bus=n]\n\
         [,unit=m][,media=d][,index=i]\n\
         [,snapshot=on|off][,cache=on|off]\n\
         [,readonly=on|off][,copy-on-read=on|off]",
        "add drive to PCI storage controller",
    ),
    line(
        "drive_backup",
        "reuse:-n,full:-f,compress:-c,device:B,target:s,format:s?",
        "[-n] [-f] [-c] device target [format]",
        "initiates a point-in-time\n\
         \t\t\tcopy for a device. The device's contents are\n\
         \t\t\tcopied to the new image file, excluding data that\n\
         \t\t\tis written after the command is started.\n\
         \t\t\tThe -n flag requests QEMU to reuse the image found\n\
         \t\t\tin new-image-file, instead of recreating it from scratch.\n\
         \t\t\tThe -f flag requests QEMU to copy the whole disk,\n\
         \t\t\tso that the result does not need a backing file.\n\
         \t\t\tThe -c flag requests QEMU to compress backup data\n\
         \t\t\t(if the target format supports it).\n\
         \t\t\t",
    ),
    line("drive_del", "device:B", "device", "remove host block device"),
    line(
        "drive_mirror",
        "reuse:-n,full:-f,device:B,target:s,format:s?",
        "[-n] [-f] device target [format]",
        "initiates live storage\n\
         \t\t\tmigration for a device. The device's contents are\n\
         \t\t\tcopied to the new image file, including data that\n\
         \t\t\tis written after the command is started.\n\
         \t\t\tThe -n flag requests QEMU to reuse the image found\n\
         \t\t\tin new-image-file, instead of recreating it from scratch.\n\
         \t\t\tThe -f flag requests QEMU to copy the whole disk,\n\
         \t\t\tso that the result does not need a backing file.\n\
         \t\t\t",
    ),
    line("eject", "force:-f,device:B", "[-f] device", "eject a removable medium (use -f to force it)"),
    line("help|?", "name:S?", "[cmd]", "show the help"),
    line("info", "item:s?", "[subcommand]", "show various information about the system state"),
    line(
        "nbd_server_add",
        "writable:-w,device:B,name:s?",
        "nbd_server_add [-w] device [name]",
        "export a block device via NBD",
    ),
    line(
        "nbd_server_remove",
        "force:-f,name:s",
        "nbd_server_remove [-f] name",
        "remove an export previously exposed via NBD",
    ),
    line(
        "nbd_server_start",
        "all:-a,writable:-w,uri:s",
        "nbd_server_start [-a] [-w] host:port",
        "serve block devices on the given host and port",
    ),
    line("nbd_server_stop", "", "nbd_server_stop", "stop serving block devices using the NBD protocol"),
    line(
        "qemu-io",
        "qdev:-d,device:B,command:s",
        "[-d] [device] \"[command]\"",
        "run a qemu-io command on a block device\n\
         \t\t\t-d: [device] is a device ID rather than a drive ID or node name",
    ),
    line("quit|q", "", "", "quit the emulator"),
    line(
        "snapshot_blkdev",
        "reuse:-n,device:B,snapshot-file:s?,format:s?",
        "[-n] device [new-image-file] [format]",
        SNAPSHOT_HELP,
    ),
    line(
        "snapshot_blkdev_internal",
        "device:B,name:s",
        "device name",
        "take an internal snapshot of device.\n\t\t\tThe format of the image used by device must\n\
         \t\t\tsupport it, such as qcow2.\n\t\t\t",
    ),
    line(
        "snapshot_delete_blkdev_internal",
        "device:B,name:s,id:s?",
        "device name [id]",
        "delete an internal snapshot of device.\n\t\t\tIf id is specified, qemu will try delete\n\
         \t\t\tthe snapshot matching both id and name.\n\t\t\tThe format of the image used by device must\n\
         \t\t\tsupport it, such as qcow2.\n\t\t\t",
    ),
    line("stop|s", "", "", "stop emulation"),
    line("system_reset", "", "", "reset the system"),
];

const SNAPSHOT_HELP: &str = "initiates a live snapshot\n\
     \t\t\tof device. If a new image file is specified, the\n\
     \t\t\tnew image file will become the new root image.\n\
     \t\t\tIf format is specified, the snapshot file will\n\
     \t\t\tbe created in that format.\n\
     \t\t\tThe default format is qcow2.  The -n flag requests QEMU\n\
     \t\t\tto reuse the image found in new-image-file, instead of\n\
     \t\t\trecreating it from scratch.";

/// What `info` can tell.
pub static INFO: &[Line] = &[
    line(
        "block",
        "nodes:-n,verbose:-v,device:B?",
        "[-n] [-v] [device]",
        "show info of one block device or all block devices (-n: show named nodes; -v: show details)",
    ),
    line("block-jobs", "", "", "show progress of ongoing block device operations"),
    line("blockstats", "", "", "show block device statistics"),
    line("history", "", "", "show the command line history"),
    line("name", "", "", "show the current VM name"),
    line(
        "named-block-nodes",
        "verbose:-v,node:B?",
        "[-v] [node]",
        "show one named node or all named nodes (-v: show details)",
    ),
    line("snapshots", "", "", "show the currently saved VM snapshots"),
    line("status", "", "", "show the current VM status (running|paused)"),
    line("uuid", "", "", "show the current VM UUID"),
    line("version", "", "", "show the version of QEMU"),
];
