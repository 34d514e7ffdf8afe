package link

import "time"

// Names under which host and guest find each other. They are part of the
// command line of the guest's machine.
const (
	// ControlPort is the virtio-serial port that carries frames.
	ControlPort = "nbd.ctl"
	// LogPort is the virtio-serial port that carries what the builder writes,
	// byte for byte, and nothing else.
	LogPort = "nbd.log"
	// InputSerial is the serial of the read-only disk with the inputs: an
	// EROFS whose root directory holds each store object under its base name.
	InputSerial = "in0"
	// ScratchSerial is the serial of the writable disk, an empty ext4.
	ScratchSerial = "scr"
	// OutputSerial is the serial of the append-only disk that takes the NARs
	// of the outputs, one after the other, each padded with zeros to OutputAlign.
	OutputSerial = "out"
	// OutputAlign is the multiple of bytes at which each NAR on the output
	// disk starts.
	OutputAlign = 4096
)

// Files of the initramfs beside the init program itself.
const (
	// InitPath is where the nbd binary lies; the kernel starts it as PID 1.
	InitPath = "/init"
	// ModuleDir holds the kernel modules, uncompressed, to be loaded in the
	// order of their file names.
	ModuleDir = "/modules"
	// ShellPath is the static busybox that builds see as /bin/sh. A guest
	// without it has no /bin/sh.
	ShellPath = "/busybox"
	// KVMModuleDir holds, in guests that are to run guests, the modules for that.
	// Those for another processor than the guest's fail to load, which is no error.
	KVMModuleDir = "/modules.kvm"
	// KVMProbeArg0 is argv[0] of the guest's own binary when it is started again as
	// the build user to see whether that can make a virtual machine.
	KVMProbeArg0 = "nbd-kvm-probe"
	// SandboxArg0 is argv[0] of the guest's own binary when it is started
	// again as the first process of a build's namespaces.
	SandboxArg0 = "nbd-sandbox"
	// BuiltinArg0 is argv[0] of the guest's own binary when it is the builder.
	BuiltinArg0 = "nbd-builtin"
)

// Version is the version of this protocol. Host and guest are the same
// binary; the number tells a template of an older binary from one of this.
const Version = 2

// BeatInterval is the time between two Beats of a guest that was woken.
const BeatInterval = 5 * time.Second

// BuiltinPrefix begins the builder of a derivation that wants one of those that
// Nix has inside itself.
const BuiltinPrefix = "builtin:"

// A Message is one frame on the control port: a pointer to one of the structs
// of this file.
type Message interface{ messageType() string }

// FeatureKVM says that the build user could make a virtual machine.
const FeatureKVM = "kvm"

// Hello is the first frame of a guest after its kernel has booted. A guest
// that was restored from a template says nothing until it is woken.
type Hello struct {
	Version int
	Kernel  string // release, as of uname -r
	// Features are names of what the guest can do, such as FeatureKVM.
	Features []string
}

// Wake gives a guest what it must not share with its siblings. The guest
// refuses a BuildOrder before it.
type Wake struct {
	Entropy []byte // at least MinEntropy bytes from the host's generator
	Time    int64  // Unix time in nanoseconds
	// CPUs is how many processors are to be up; fewer than are up change nothing.
	CPUs int
}

// MinEntropy is the least number of bytes that a Wake must carry.
const MinEntropy = 64

// Awake answers a Wake: the guest has entropy and time. Beats follow from here
// on.
type Awake struct{}

// Beat says that the guest is alive, every BeatInterval.
type Beat struct {
	// Usage is what the build has used so far; nil before it runs.
	Usage *Usage
}

// A Usage is what all processes of a build have used together. Zero fields are
// unknown.
type Usage struct {
	CPUUser, CPUSystem time.Duration // nanoseconds
	PeakMemory         int64         // bytes charged to the build at most
	PeakScratch        int64         // bytes in use on the scratch disk at most
}

// Started says that the builder program runs (its execve succeeded or its
// failure is in the log).
type Started struct{}

// A BuildOrder is all that a guest needs to know of a build. What Nix calls
// structured attributes, passed files and reference graphs are Files and Env
// here. Arguments and environment are bytes, not text: JSON would mend what is
// not UTF-8.
type BuildOrder struct {
	// DrvPath is the derivation's store path, for messages.
	DrvPath string
	// System is "x86_64-linux", "i686-linux" …; it selects the personality.
	System string
	// Builder is the program to execute, or begins with BuiltinPrefix: then Env is
	// the attributes of the derivation, and Args and Files are empty.
	Builder string
	// Args is argv, its element 0 included.
	Args [][]byte
	// Env is the environment, each element "NAME=value".
	Env [][]byte
	// Files are written to the build directory before the builder starts.
	Files []File
	// Inputs are the base names of the store objects that the builder may
	// see. All of them are in the root directory of the input disk.
	Inputs []string
	// Outputs are what the builder must make, in the order in which their NARs
	// are sent.
	Outputs []Output
	// FixedOutput says that the content of the output is known beforehand.
	FixedOutput bool
	// KVM says whether the builder gets /dev/kvm.
	KVM bool
	// CPUs is the number of processors that the build may use, the first ones;
	// zero leaves it all.
	CPUs int
	// MemoryMiB bounds the memory of the build, page cache included; zero
	// leaves it all that the guest has but for the agent's.
	MemoryMiB int
	// Network is the network of the build; nil for none but its own loopback.
	Network *Network
	// MaxProcesses bounds the number of processes and threads of the build, which
	// is killed when it wants more; zero is no bound.
	MaxProcesses int
	// Unconfined has the builder run as root outside the sandbox. It is for tests
	// of what somebody meets who has broken out.
	Unconfined bool
}

// A File is one regular file of the build directory.
type File struct {
	Name string // one path component
	Data []byte
}

// A Network is how a guest uses the network device that it gets with the order.
type Network struct {
	// MAC is the address of the device, by which it is found.
	MAC string
	MTU int
	// Addresses are those of the device, with the bits of their networks
	// ("192.0.0.2/29"); Gateways the way to all others, one for each.
	Addresses, Gateways []string
	Nameserver          string
	// Certificates are those of the authorities that the build may trust, in PEM;
	// may be empty.
	Certificates []byte
}

// An Output is one output of a build, at the path that the builder was told.
type Output struct {
	Name string // "out", "dev", …
	Path string // absolute
}

// Outputs says that the NARs of all outputs lie on the output disk and have
// been flushed. It is sent only for a builder that succeeded, before Result.
type Outputs struct{ Outputs []OutputInfo }

// OutputInfo describes one NAR on the output disk. It has no hash: the host
// computes its own as it stores the NAR, and under emulation hashing in the
// guest takes eight times as long as everything else that sends an output.
type OutputInfo struct {
	Name string
	Size int64 // bytes of the NAR, without what pads it
}

// A Kind says how a build ended.
type Kind string

// The kinds of a Result.
const (
	// Exited: the builder ended by itself with ExitStatus. With 0 the build
	// has succeeded and an Outputs frame came before.
	Exited Kind = "exited"
	// Signaled: the builder was ended by Signal.
	Signaled Kind = "signaled"
	// OutputMissing: the builder succeeded without making an output; Message
	// is for the user.
	OutputMissing Kind = "output-missing"
	// OutputRefused: an output is nothing that a store can hold; Message is
	// for the user.
	OutputRefused Kind = "output-refused"
	// Internal: the guest itself failed, Message says how; the build has
	// neither succeeded nor failed.
	Internal Kind = "internal"
)

// A Result is the last frame of a build.
type Result struct {
	Kind       Kind
	ExitStatus int    // with Exited
	Signal     int    // with Signaled
	Message    string // with OutputMissing, OutputRefused and Internal

	// LogBytes is how many bytes the guest has put into the log port, all of
	// them before this frame. The two ports are not ordered: the host has the
	// whole log when it has read as many.
	LogBytes int64

	Usage

	// What may have starved the builder, whatever its exit status:
	OOMKills     int64 // processes killed for lack of memory
	ProcessLimit int64 // forks refused because of MaxProcesses
	DiskFull     bool  // the scratch disk was (nearly) full at some time
	IOErrors     bool  // the kernel reported an error of a disk or a file system
}

func (*Hello) messageType() string      { return "hello" }
func (*Wake) messageType() string       { return "wake" }
func (*Awake) messageType() string      { return "awake" }
func (*Beat) messageType() string       { return "beat" }
func (*Started) messageType() string    { return "started" }
func (*BuildOrder) messageType() string { return "build" }
func (*Outputs) messageType() string    { return "outputs" }
func (*Result) messageType() string     { return "result" }

// newMessage returns an empty message of a type, nil if there is none.
func newMessage(messageType string) Message {
	switch messageType {
	case "hello":
		return new(Hello)
	case "wake":
		return new(Wake)
	case "awake":
		return new(Awake)
	case "beat":
		return new(Beat)
	case "started":
		return new(Started)
	case "build":
		return new(BuildOrder)
	case "outputs":
		return new(Outputs)
	case "result":
		return new(Result)
	}
	return nil
}
