# Looking at images that the reference has made and written.
ref-img create -q -f qcow2 a.qcow2 64M && qemu-io -c 'write -q -P 3 1M 200k' -c 'write -q -z 4M 1M' -c 'write -q -P 7 20M 3M' -c 'discard -q 21M 1M' a.qcow2
ref-img create -q -f qcow2 -b a.qcow2 -F qcow2 b.qcow2 && qemu-io -c 'write -q -P 4 10M 64k' -c 'write -q -P 5 1M 64k' b.qcow2
ref-img create -q -f raw r.raw 1M && qemu-io -f raw -c 'write -q -P 5 64k 64k' r.raw
ref-img create -q -f qcow2 -o extended_l2=on,cluster_size=64k x.qcow2 8M && qemu-io -c 'write -q -P 9 4k 10k' -c 'write -q -z 64k 6k' x.qcow2
ref-img convert -c -O qcow2 b.qcow2 c.qcow2
qemu-img map a.qcow2
qemu-img map --output=json a.qcow2
qemu-img map b.qcow2
qemu-img map --output=json b.qcow2
qemu-img map --output=json -s 1M -l 2M b.qcow2
qemu-img map r.raw
qemu-img map --output=json r.raw
qemu-img map x.qcow2
qemu-img map --output=json c.qcow2
qemu-img map c.qcow2
qemu-img map nope
qemu-img map --output=foo a.qcow2
qemu-img check a.qcow2
qemu-img check b.qcow2
qemu-img check c.qcow2
qemu-img check x.qcow2
qemu-img check --output=json a.qcow2
qemu-img check r.raw
qemu-img check nope
qemu-img check -r foo a.qcow2
qemu-img compare a.qcow2 b.qcow2
qemu-img compare a.qcow2 a.qcow2
qemu-img compare b.qcow2 c.qcow2
qemu-img compare -s b.qcow2 c.qcow2
qemu-img compare a.qcow2 r.raw
qemu-img compare -s a.qcow2 r.raw
qemu-img compare -q a.qcow2 b.qcow2
qemu-img compare a.qcow2 nope
qemu-img compare a.qcow2
# A cluster that nothing refers to, a wrong refcount, and a table where there is none.
cp a.qcow2 leak.qcow2 && printf '\0\1' | dd of=leak.qcow2 bs=1 seek=$((131072 + 2 * 200)) conv=notrunc status=none
qemu-img check leak.qcow2
qemu-img check -r leaks leak.qcow2
qemu-img check leak.qcow2
cp a.qcow2 low.qcow2 && printf '\0\0' | dd of=low.qcow2 bs=1 seek=$((131072 + 2 * 5)) conv=notrunc status=none
qemu-img check low.qcow2
qemu-img check -r leaks low.qcow2
qemu-img check -r all low.qcow2
qemu-img check low.qcow2
cp a.qcow2 lost.qcow2 && printf '\200\0\0\0\7\0\0\0' | dd of=lost.qcow2 bs=1 seek=196608 conv=notrunc status=none
qemu-img check lost.qcow2
printf 'QFI\373\0\0\0\11' > wrong.qcow2 && truncate -s 1M wrong.qcow2
qemu-img info wrong.qcow2
qemu-img check wrong.qcow2
head -c 50 a.qcow2 > short.qcow2
qemu-img info -f qcow2 short.qcow2
