# Making images, and what is told of them.
qemu-img create -f qcow2 a.qcow2 64M
qemu-img create -f qcow2 -b a.qcow2 -F qcow2 b.qcow2
qemu-img create -f qcow2 -b a.qcow2 -F qcow2 bigger.qcow2 128M
qemu-img create -f qcow2 -b a.qcow2 b2.qcow2
qemu-img create r.raw 1M
qemu-img create -f raw r2.raw 1000
qemu-img create -f qcow2 -o cluster_size=4k,compat=0.10 v2.qcow2 10M
qemu-img create -f qcow2 -o cluster_size=2M,refcount_bits=1 big.qcow2 10M
qemu-img create -f qcow2 -o refcount_bits=64,lazy_refcounts=on wide.qcow2 10M
qemu-img create -f qcow2 -o compression_type=zstd z.qcow2 10M
qemu-img create -f qcow2 -o preallocation=metadata,extended_l2=on p.qcow2 8M
qemu-img create -f qcow2 -o preallocation=falloc f.qcow2 8M
qemu-img create -f qcow2 -o preallocation=full full.qcow2 2M
qemu-img create -q -f qcow2 quiet.qcow2 8M
qemu-img create -f qcow2
qemu-img create -f foo x 1M
qemu-img create -f qcow2 x
qemu-img create -f qcow2 x -1
qemu-img create -f qcow2 x 1Q
qemu-img create -f qcow2 -o cluster_size=3k x 1M
qemu-img create -f qcow2 -o cluster_size=4M x 1M
qemu-img create -f qcow2 -o refcount_bits=3 x 1M
qemu-img create -f qcow2 -o foo=bar x 1M
qemu-img create -f qcow2 /nowhere/x.qcow2 1M
qemu-img create -f qcow2 -b nope -F qcow2 x
qemu-img create -f qcow2 -b nope -F qcow2 x 1M
qemu-img create -f qcow2 -u -b nope -F qcow2 unsafe.qcow2 1M
qemu-img info a.qcow2
qemu-img info b.qcow2
qemu-img info --output=json b.qcow2
qemu-img info --backing-chain b.qcow2
qemu-img info --output=json --backing-chain b.qcow2
qemu-img info r.raw
qemu-img info r2.raw
qemu-img info v2.qcow2
qemu-img info big.qcow2
qemu-img info wide.qcow2
qemu-img info z.qcow2
qemu-img info p.qcow2
qemu-img info -f raw a.qcow2
qemu-img info -f qcow2 r.raw
qemu-img info unsafe.qcow2
qemu-img info --backing-chain unsafe.qcow2
qemu-img info nope
# Each is sound, and reads the same with both.
for i in a b v2 big wide z p f full quiet; do ref-img check -q $i.qcow2 && ref-img convert -O raw $i.qcow2 $i.out && md5sum < $i.out; done
for i in a b v2 big wide z p f full quiet; do qemu-img check -q $i.qcow2 && qemu-img convert -O raw $i.qcow2 $i.out && md5sum < $i.out; done
