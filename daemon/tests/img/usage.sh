# Words that cannot be understood.
qemu-img
qemu-img foo
qemu-img --foo
qemu-img info
qemu-img info -Z a
qemu-img info --foo a
qemu-img info a b
qemu-img info --output=foo a
qemu-img map
qemu-img check
qemu-img compare
qemu-img commit
qemu-img commit -Z c
qemu-img convert
qemu-img resize
qemu-img create
qemu-img create -Z
