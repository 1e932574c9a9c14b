//! What the machine says about itself.

/// The answer to `-version`.
pub fn version() -> String {
    format!(
        "QEMU emulator version 10.0.2 (Underlay {})\n\
         Copyright (c) 2026 The Underlay authors; the interface is that of QEMU 10.0.2\n",
        env!("CARGO_PKG_VERSION")
    )
}

/// The answer to `-help`; `%s` stands for the program.
pub const HELP: &str = "\
Usage: %s [options] [disk]
Underlay's machine: devices with disks, monitors, and no CPU. Guests come by exports.

-h, -help       display this help and exit
-version        display version information and exit

Disks:
-blockdev [driver=]DRIVER,node-name=NAME[,OPTION=VALUE...]
                open a block node
-drive [file=FILE][,if=none|ide|virtio][,id=NAME][,media=disk|cdrom][,index=I][,bus=N][,unit=M]
       [,format=F][,snapshot=on|off][,cache=MODE][,aio=threads|native|io_uring]
       [,readonly=on|off][,copy-on-read=on|off][,discard=ignore|unmap][,detect-zeroes=on|off|unmap]
       [,werror=ignore|stop|report|enospc][,rerror=ignore|stop|report]
       [,throttling.LIMIT=N...][,throttling.group=G][,node-name=NODE][,OPTION=VALUE...]
                a disk with a name, in a device of its own unless if=none
-hda/-hdb/-hdc/-hdd FILE, -cdrom FILE
                IDE disks and a CD
-snapshot       write to temporary files instead of disk image files
-device MODEL[,id=ID][,drive=NAME][,bus=BUS][,PROPERTY=VALUE...]
                a device: virtio-blk, scsi-hd, scsi-cd, ide-hd, ide-cd, virtio-scsi, ...
                -device help lists all of them, -device MODEL,help the properties of one
-object TYPE,id=ID[,PROPERTY=VALUE...]
                throttle-group, iothread

Guests (these options are Underlay's own):
-nbd-server addr.type=unix,addr.path=PATH[,max-connections=N][,handshake-max-seconds=N]
-nbd-server addr.type=inet,addr.host=HOST,addr.port=PORT[,...]
                start the NBD server
-export [type=]nbd,id=ID,node-name=NAME[,name=EXPORT][,writable=on|off][,...]
                export a node; or a device, by its id or the name of its drive: then its guest waits
                while the machine is stopped

Monitors:
-chardev KIND,id=ID[,...]
                a character device: socket, pty, pipe, stdio, file, null
-mon [chardev=]ID[,mode=readline|control][,pretty=on|off]
-monitor DEV    a monitor for people; DEV is stdio, unix:PATH, tcp:HOST:PORT, pty, pipe:PATH, none
-qmp DEV, -qmp-pretty DEV
                a QMP monitor

The machine:
-machine [type=]pc|q35|...
                the kind of machine: which IDE buses there are
-name NAME, -uuid UUID
                what query-name and query-uuid say
-S              wait for `cont`
-incoming defer|tcp:...|...
                wait for `cont` with disks that are somebody else's until then
-display TYPE, -nographic, -nodefaults
                there is no display; -nographic brings a monitor to the terminal
-pidfile FILE   write the process number to FILE; removed at the end
-daemonize      go to the background once everything is set up

Options about CPU, memory, firmware, displays and networks are taken and have no effect.
";
