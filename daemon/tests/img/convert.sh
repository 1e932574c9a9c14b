# Copies of all kinds, and sizes.
ref-img create -q -f qcow2 a.qcow2 8M && qemu-io -c 'write -q -P 3 1M 200k' -c 'write -q -z 4M 1M' a.qcow2
ref-img create -q -f qcow2 -b a.qcow2 -F qcow2 b.qcow2 && qemu-io -c 'write -q -P 4 2M 64k' b.qcow2
ref-img create -q -f qcow2 -b b.qcow2 -F qcow2 c.qcow2 10M && qemu-io -c 'write -q -P 5 3M 64k' -c 'write -q -z 1M 64k' c.qcow2
qemu-img convert -O raw b.qcow2 b.raw && md5sum b.raw
qemu-img convert -f raw -O qcow2 b.raw d.qcow2 && ref-img check d.qcow2 && ref-img compare d.qcow2 b.raw
qemu-img convert -c -O qcow2 b.raw e.qcow2 && ref-img check -q e.qcow2 && ref-img compare e.qcow2 b.qcow2
qemu-img convert -c -O qcow2 -o compression_type=zstd b.raw e.qcow2 && ref-img check -q e.qcow2 && ref-img compare e.qcow2 b.qcow2
qemu-img convert -O qcow2 -o cluster_size=4k,compat=0.10 b.qcow2 v2.qcow2 && ref-img check -q v2.qcow2 && ref-img compare v2.qcow2 b.qcow2
qemu-img convert -O qcow2 a.qcow2 b.qcow2 both.qcow2 && ref-img convert -O raw both.qcow2 both.raw && md5sum both.raw
qemu-img convert -p -O raw b.qcow2 p.raw
qemu-img convert -S 0 -O raw b.qcow2 s.raw && md5sum s.raw
qemu-img convert -S 64k -m 16 -W -O raw b.qcow2 s.raw && md5sum s.raw
ref-img create -q -f qcow2 n.qcow2 8M && qemu-io -c 'write -q -P 9 0 8M' n.qcow2 && qemu-img convert -n -O qcow2 b.qcow2 n.qcow2 && ref-img compare n.qcow2 b.qcow2
ref-img create -q -f qcow2 small.qcow2 1M; qemu-img convert -n -O qcow2 b.qcow2 small.qcow2
qemu-img convert -O qcow2 -B b.qcow2 -F qcow2 c.qcow2 over.qcow2 && ref-img compare over.qcow2 c.qcow2 && ref-img map --output=json over.qcow2 | sed 's/, "offset": [0-9]*//'
qemu-img convert -O qcow2 -o backing_file=b.qcow2,backing_fmt=qcow2 c.qcow2 over.qcow2 && ref-img compare over.qcow2 c.qcow2
qemu-img convert -c -O qcow2 -B b.qcow2 -F qcow2 c.qcow2 over.qcow2 && ref-img compare over.qcow2 c.qcow2 && ref-img check -q over.qcow2
qemu-img convert -O qcow2 -B b.qcow2 c.qcow2 x.qcow2
qemu-img convert -O raw -B b.qcow2 -F qcow2 c.qcow2 x.raw
qemu-img convert -O qcow2 -B b.qcow2 -F qcow2 c.qcow2 b.qcow2 x.qcow2
qemu-img convert -O qcow2 -B nope -F qcow2 c.qcow2 x.qcow2
qemu-img convert nope x.qcow2
qemu-img convert a.qcow2
qemu-img convert -m 17 a.qcow2 x.raw
qemu-img convert -O foo a.qcow2 x
qemu-img resize a.qcow2 16M && ref-img info a.qcow2 | grep virtual
qemu-img resize a.qcow2 1M
qemu-img resize --shrink a.qcow2 4M && ref-img check a.qcow2
qemu-img resize -f raw b.raw +1M && stat -c %s b.raw
qemu-img resize a.qcow2 -1M
qemu-img resize --shrink a.qcow2 -100M
qemu-img resize -q a.qcow2 +1M
qemu-img resize a.qcow2
qemu-img resize a.qcow2 foo
qemu-img resize nope 1M
qemu-img resize --preallocation=full a.qcow2 +1M && ref-img check -q a.qcow2
