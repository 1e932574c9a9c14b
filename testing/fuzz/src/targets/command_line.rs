//! Command lines of all programs, as far as they are read before anything is opened.
//!
//! Words are lines; the first one is the program's name. Of an unknown program all are tried.

use underlay_img::getopt::{Known, parse};
use underlay_img::sizes;

/// The options of most of `qemu-img`'s commands together.
const IMG: Known = Known {
    short: "f:O:o:b:F:S:m:r:s:l:cdhnpquUW",
    long: &[("output", "output", true), ("image-opts", "image-opts", false), ("object", "object", true)],
};

/// A program's name, and how it reads its words.
type Program = (&'static str, fn(&[String]));

/// Reads the words.
pub fn run(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let mut words: Vec<String> = text.lines().map(str::to_owned).collect();
    let program = if words.is_empty() { String::new() } else { words.remove(0) };
    let programs: [Program; 5] = [
        ("qemu-storage-daemon", |words| drop(underlay_daemon::storage_daemon::understood(words))),
        ("qemu-system-x86_64", |words| drop(underlay_daemon::machine::understood(words))),
        ("qemu-img", img),
        ("qemu-io", |words| {
            underlay_io::is_understood(words);
        }),
        ("qemu-nbd", |words| drop(underlay_nbd_server::command_line::understand(words, &mut |_| ()))),
    ];
    let known = programs.iter().any(|(name, _)| *name == program);
    for (_, read) in programs.iter().filter(|(name, _)| !known || *name == program) {
        read(&words);
    }
}

fn img(words: &[String]) {
    let Ok((options, others)) = parse(IMG, words) else { return };
    for value in options.into_iter().map(|(_, value)| value).chain(others) {
        let _ = sizes::argument(&value, "size");
        let _ = sizes::option(&value, "size");
        underlay_disk::parse_options(&value, Some("driver"));
    }
}

/// Command lines that are fine, and some that nearly are.
pub fn seeds() -> Vec<Vec<u8>> {
    [
        "qemu-storage-daemon --blockdev driver=qcow2,node-name=a,file.driver=file,file.filename=a.qcow2,cache-clean-interval=60 \
         --nbd-server addr.type=inet,addr.host=::1,addr.port=10809,addr.to=10900,addr.ipv6=on,addr.keep-alive=on,max-connections=5 \
         --export type=nbd,id=e,node-name=a,name=disk,writable=on,iothread=io --daemonize --pidfile=pid",
        "qemu-storage-daemon --chardev socket,id=m,path=qmp.sock,server=on,wait=off,logfile=log,logappend=on --monitor m,pretty=on \
         --chardev socket,id=n,host=localhost,port=4444,to=5555,ipv4=on,telnet=on,server,nowait --monitor chardev=n,mode=control",
        "qemu-storage-daemon --chardev socket,path=a,,b,abstract=on,tight=off,reconnect-ms=0x10,id=c --chardev stdio,id=s,signal=on \
         --chardev pty,id=p,path=link --chardev pipe,id=q,path=p --chardev file,id=f,path=o,append=on --chardev fd=3,id=x,backend=socket",
        "qemu-storage-daemon --object throttle-group,id=g,limits.iops-total=100,x-bps-read=5 --object iothread,id=io,poll-max-ns=32768 -V",
        "qemu-storage-daemon --blockdev {\"driver\":\"nbd\",\"node-name\":\"n\",\"server\":{\"type\":\"unix\",\"path\":\"s\",\"abstract\":true}}",
        "qemu-system-x86_64 -M q35,accel=tcg -m 64 -nographic -S -name guest=a -drive file=a.img,format=raw,if=virtio,cache=none,werror=stop \
         -device virtio-scsi,id=s -device {\"driver\":\"scsi-hd\",\"drive\":\"n\",\"share-rw\":true,\"lun\":3} -device scsi-cd,bus=s.0,serial=x \
         -monitor telnet:localhost:44,server,nowait -qmp unix:a,,b,server=on -mon chardev=m,mode=control,pretty=on -incoming defer",
        "qemu-img convert -f raw -O qcow2 -o cluster_size=64k,preallocation=metadata -S 4k -m 8 -W a.raw b.qcow2",
        "qemu-img create -f qcow2 -b a.qcow2 -F qcow2 b.qcow2 1.5G",
        "qemu-io -c read\u{a0}-P\u{a0}0x5a\u{a0}0\u{a0}64k -c write\u{a0}-z\u{a0}1M\u{a0}1.5k --image-opts driver=null-co,size=1M",
        "qemu-io -f qcow2 -t none -i io_uring -d unmap -rU a.qcow2",
        "qemu-nbd -k /tmp/s -x name -D text -e 5 -t --cache=none --aio=threads --discard=unmap -f qcow2 a.qcow2",
        "qemu-nbd -b 127.0.0.1 -p 0x2a39 --image-opts driver=raw,file.filename=a,offset=512",
        "any -- --foo=bar -xyz --he",
    ]
    .map(|line| line.split_whitespace().filter(|word| *word != "\\").collect::<Vec<_>>().join("\n"))
    .map(|line| line.replace('\u{a0}', " ").into_bytes())
    .to_vec()
}
