package vm

import (
	"fmt"
	"strconv"
	"strings"

	"nbd/vm/link"
)

// The descriptors that QEMU inherits. It opens nothing by a name of the host:
// sockets are connected pairs, and files have no names any more or never had
// one. So no folder need be open to its user id, nothing remains when it ends,
// and its command line is the same for all guests of one shape.
const (
	fdRAM     = iota + 3 // memfd with the guest's memory
	fdKernel             // file
	fdInitrd             // file
	fdScratch            // file
	fdQMP                // sockets from here on
	fdControl
	fdLog
	fdInputs
	fdSink
	fdNetwork // only of guests with a network
)

// tbSizeMiB caps the translation cache of TCG, whose default is a gibibyte.
const tbSizeMiB = 128

// A machine is the hardware that a guest sees: its scratch disk, and all of its
// command line but what it is started for. Equal machines share a template.
type machine struct {
	arch      *arch
	accel     string // "kvm" or "tcg"
	vcpus     int
	memoryMiB int
	// scratchGiB is the size of the scratch disk, which has a file system already.
	scratchGiB int
	// tscKHz is the true frequency of the host's time stamp counter; zero means
	// that it is not known to 0.1 % and the guest shall measure it.
	tscKHz int
	// kvm guests can run guests: builds in them may find /dev/kvm.
	kvm bool
	// onDemand guests boot with one processor. The others are brought up when it
	// is known how many a build gets.
	onDemand bool
}

// A mode is what a guest is started for.
type mode int

const (
	modeBoot  mode = iota // from cold; its memory may become a template
	modeClone             // from a template, waiting for the saved state
)

// cpuModel returns the value of -cpu.
func (a *arch) cpuModel(accel string) string {
	if accel == "kvm" {
		return a.cpuKVM
	}
	return a.cpuTCG
}

// arguments returns QEMU's arguments without its name. They name no path of
// the host, so that a template can be keyed by them.
func arguments(m machine, how mode) []string {
	accel := "kvm"
	if m.accel == "tcg" {
		accel = fmt.Sprintf("tcg,thread=multi,tb-size=%d", tbSizeMiB)
	}
	args := []string{
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-M", m.arch.machine + ",memory-backend=mem0",
		"-accel", accel,
		"-cpu", m.arch.cpuModel(m.accel),
		"-smp", strconv.Itoa(m.vcpus),
		"-m", fmt.Sprintf("%dM", m.memoryMiB),
		// Without reserve=off the kernel may refuse mappings larger than the
		// host's memory.
		"-object", fmt.Sprintf("memory-backend-file,id=mem0,size=%dM,mem-path=%s,share=on,reserve=off", m.memoryMiB, inherited(fdRAM)),
		"-kernel", inherited(fdKernel),
		"-initrd", inherited(fdInitrd),
		"-append", kernelParameters(m),
		// The console goes to our pipe: a file could be filled without bound.
		"-chardev", "stdio,id=con,signal=off", "-serial", "chardev:con",
		"-chardev", socketDevice("qmp", fdQMP), "-mon", "chardev=qmp,mode=control",
		"-device", "virtio-serial-pci,id=vs0",
	}
	args = append(args,
		"-chardev", socketDevice("ctl", fdControl), "-device", "virtserialport,bus=vs0.0,chardev=ctl,name="+link.ControlPort,
		"-chardev", socketDevice("log", fdLog), "-device", "virtserialport,bus=vs0.0,chardev=log,name="+link.LogPort,
		"-device", "virtio-rng-pci", "-device", "pvpanic-pci",
		"-blockdev", socketDisk(link.InputSerial, fdInputs)+",read-only=on", "-device", blockDevice(link.InputSerial),
		"-blockdev", fmt.Sprintf("driver=raw,node-name=%s,discard=unmap,detect-zeroes=unmap,cache.no-flush=on,file.driver=file,file.filename=%s", link.ScratchSerial, inherited(fdScratch)),
		"-device", blockDevice(link.ScratchSerial),
		"-device", "pcie-root-port,id="+netPort+",chassis=1,slot=1",
		"-blockdev", socketDisk(link.OutputSerial, fdSink)+",read-only=off", "-device", blockDevice(link.OutputSerial),
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
	)
	if m.accel == "kvm" {
		for _, d := range m.arch.devices {
			args = append(args, "-device", d)
		}
	}
	if how == modeClone {
		args = append(args, "-incoming", "defer")
	}
	return args
}

// inherited returns the name of an inherited file.
func inherited(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

// socketDevice returns a character device on an inherited socket.
func socketDevice(id string, fd int) string { return fmt.Sprintf("socket,id=%s,fd=%d", id, fd) }

// socketDisk returns a disk that is served on an inherited socket.
func socketDisk(node string, fd int) string {
	return fmt.Sprintf("driver=nbd,node-name=%s,server.type=fd,server.str=%d", node, fd)
}

// blockDevice returns the guest's side of a disk. The agent finds it by its
// serial.
func blockDevice(node string) string {
	return fmt.Sprintf("virtio-blk-pci,drive=%s,serial=%s", node, node)
}

// kernelParameters returns the command line of the guest's kernel. A cpuset keeps
// a build from processors that are up and that it is not given.
func kernelParameters(m machine) string {
	p := []string{"quiet", "panic=-1", "console=" + m.arch.console, "cryptomgr.notests"}
	if m.onDemand {
		p = append(p, "maxcpus=1")
	}
	if m.accel == "tcg" {
		p = append(p, m.arch.parameters...)
		if m.tscKHz > 0 {
			p = append(p, fmt.Sprintf("tsc_early_khz=%d", m.tscKHz))
		}
	}
	return strings.Join(p, " ")
}
