# The same content on another backing file.
ref-img create -q -f qcow2 a.qcow2 4M && qemu-io -c "write -q -P 1 0 2M" a.qcow2
ref-img create -q -f qcow2 -b a.qcow2 -F qcow2 b.qcow2 && qemu-io -c "write -q -P 2 1M 2M" b.qcow2
ref-img create -q -f qcow2 -b b.qcow2 -F qcow2 c.qcow2 6M && qemu-io -c "write -q -P 3 3M 64k" -c "write -q -z 0 64k" -c "write -q -P 5 5M 64k" c.qcow2
ref-img create -q -f qcow2 e.qcow2 8M && qemu-io -c "write -q -P 9 0 8M" e.qcow2
ref-img convert -O raw a.qcow2 r.raw
for i in 1 2 3 4 5 6; do cp c.qcow2 $i.qcow2; done
qemu-img rebase -b a.qcow2 -F qcow2 1.qcow2; ref-img compare 1.qcow2 c.qcow2; ref-img check -q 1.qcow2; ref-img map 1.qcow2 | cut -c1-32; ref-img info 1.qcow2 | grep backing
qemu-img rebase -p -b '' 2.qcow2; ref-img compare 2.qcow2 c.qcow2; ref-img check -q 2.qcow2; ref-img info 2.qcow2 | grep backing
qemu-img rebase -b e.qcow2 -F qcow2 3.qcow2; ref-img compare 3.qcow2 c.qcow2; ref-img check -q 3.qcow2
qemu-img rebase -b r.raw -F raw 4.qcow2; ref-img compare 4.qcow2 c.qcow2; ref-img check -q 4.qcow2
qemu-img rebase -c -b '' 5.qcow2; ref-img compare 5.qcow2 c.qcow2; ref-img check -q 5.qcow2
qemu-img rebase -u -b a.qcow2 -F qcow2 6.qcow2; ref-img info 6.qcow2 | grep backing
qemu-img rebase -u -b nope.qcow2 -F qcow2 6.qcow2; ref-img info 6.qcow2 | grep backing
qemu-img rebase -b a.qcow2 -F qcow2 6.qcow2
qemu-img rebase -u 6.qcow2; ref-img info 6.qcow2 | grep backing
qemu-img rebase -b a.qcow2 c.qcow2
qemu-img rebase -u -b nope.qcow2 c.qcow2
qemu-img rebase c.qcow2
qemu-img rebase
qemu-img rebase -b nope -F qcow2 c.qcow2
qemu-img rebase -b nope -F foo c.qcow2
qemu-img rebase -u -b a.qcow2 -F foo c.qcow2
qemu-img rebase -b c.qcow2 -F qcow2 c.qcow2
qemu-img rebase -f raw -b a.qcow2 -F qcow2 c.qcow2
qemu-img rebase -t foo -b a.qcow2 -F qcow2 c.qcow2
qemu-img rebase -T foo -b a.qcow2 -F qcow2 c.qcow2
qemu-img rebase -b a.qcow2 -F qcow2 nope
ref-img compare c.qcow2 1.qcow2
