# What an image has goes into one below it.
ref-img create -q -f qcow2 a.qcow2 4M && qemu-io -c "write -q -P 1 0 2M" a.qcow2
ref-img create -q -f qcow2 -b a.qcow2 -F qcow2 b.qcow2 && qemu-io -c "write -q -P 2 1M 2M" b.qcow2
ref-img create -q -f qcow2 -b b.qcow2 -F qcow2 c.qcow2 6M && qemu-io -c "write -q -P 3 3M 64k" -c "write -q -z 0 64k" -c "write -q -P 5 5M 64k" c.qcow2
cp -r . ../1 && cp -r . ../2 && cp -r . ../3 && cp -r . ../4
qemu-img commit c.qcow2
for i in a b c; do ref-img check -q $i.qcow2; ref-img convert -O raw $i.qcow2 x && md5sum < x; ref-img info $i.qcow2 | grep -e virtual -e backing; done
cd ../1 && qemu-img commit -d c.qcow2; for i in a b c; do ref-img check -q $i.qcow2; ref-img convert -O raw $i.qcow2 x && md5sum < x; done
cd ../2 && qemu-img commit -b a.qcow2 c.qcow2; for i in a c; do ref-img check -q $i.qcow2; ref-img convert -O raw $i.qcow2 x && md5sum < x; done
cd ../3 && qemu-img commit -p -b b.qcow2 c.qcow2; for i in a b c; do ref-img check -q $i.qcow2; ref-img convert -O raw $i.qcow2 x && md5sum < x; done
cd ../4 && qemu-img commit -q b.qcow2; for i in a b c; do ref-img check -q $i.qcow2; ref-img convert -O raw $i.qcow2 x && md5sum < x; done
qemu-img commit a.qcow2
qemu-img commit -b nope c.qcow2
qemu-img commit -b c.qcow2 c.qcow2
qemu-img commit nope
qemu-img commit -t foo c.qcow2
qemu-img commit -r 1x c.qcow2
qemu-img commit -r 1G c.qcow2
qemu-img commit -f raw c.qcow2
