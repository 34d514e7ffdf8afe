package vm

import (
	"bufio"
	"bytes"
	"cmp"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nbd/nixproto"
	"nbd/nixproto/nar"
)

// BenchmarkRead reads a closure in a guest, file after file, by each way in which
// files of the host can get there: our disk, which exists nowhere; an image file
// that mkfs.erofs made of the same files; virtiofs; and 9p. It reports the CPU
// time of QEMU, of whoever serves the files and of this process together, of
// looking at all files ("walk-cpu-s") and of reading them for the first time
// ("read-cpu-s"), and wall times. Of what is not installed, or not in the kernel
// (NBD_BENCH_KERNEL; clouds' kernels lack 9p), it says so.
func BenchmarkRead(b *testing.B) {
	c := newReadClosure(b, *benchFiles)
	for _, t := range []*transport{ownDisk(b, c), rawImage(b, c), virtioFS(b, c), nineP(b, c)} {
		b.Run(t.name, func(b *testing.B) { t.benchmark(b, c) })
	}
}

var benchFiles = flag.Int("benchfiles", 30_000, "how many files BenchmarkRead reads")

// A readClosure is a closure as NARs in files, as the store keeps them, and
// unpacked.
type readClosure struct {
	dir    string // unpacked
	images []ImagePath
	files  int
	bytes  int64
	kernel Kernel
	reader string // the guest's init
}

// newReadClosure makes paths of 60 files each, of 0 to 16 KiB.
func newReadClosure(b *testing.B, files int) *readClosure {
	b.Helper()
	c := &readClosure{dir: filepath.Join(b.TempDir(), "files"), reader: buildProgram(b, "./testdata/reader")}
	state := b.TempDir()
	must := func(err error) {
		if err != nil {
			b.Helper()
			b.Fatal(err)
		}
	}
	_, err := Import(state, cmp.Or(os.Getenv("NBD_BENCH_KERNEL"), os.Getenv("NBD_TEST_KERNEL")))
	must(err)
	c.kernel, err = findKernel(state, "", archX8664)
	must(err)
	text := strings.Repeat("the quick brown fox jumps over the lazy dog\n", 400)
	for c.files < files {
		name := fmt.Sprintf("%032d-package", c.files)
		folders := map[string]*tree{}
		for d := range 5 {
			kids := map[string]*tree{}
			for i := range 12 {
				data := text[:c.files*7919%(16<<10)]
				kids[fmt.Sprintf("some-usual-name-%d.h", i)] = file(data)
				path := filepath.Join(c.dir, name, fmt.Sprintf("directory-%d", d))
				must(os.MkdirAll(path, 0o755))
				must(os.WriteFile(filepath.Join(path, fmt.Sprintf("some-usual-name-%d.h", i)), []byte(data), 0o444))
				c.files++
				c.bytes += int64(len(data))
			}
			folders[fmt.Sprintf("directory-%d", d)] = dir(kids)
		}
		archive := dir(folders).archive(b)
		index, size, err := nar.ReadIndex(bytes.NewReader(archive))
		must(err)
		path := filepath.Join(b.TempDir(), name)
		must(os.WriteFile(path, archive, 0o644))
		blob, err := os.Open(path)
		must(err)
		b.Cleanup(func() { blob.Close() })
		c.images = append(c.images, ImagePath{nixproto.StorePath(nixproto.StoreDir + "/" + name), blob, size, index})
	}
	return c
}

// A transport is a way for files into a guest.
type transport struct {
	name    string
	lacks   string // what it needs and is not there
	modules []string
	mount   string // the reader's command line
	// start begins to serve the files to one guest, and returns what QEMU needs for
	// it, the process that serves, if any, and what ends it.
	start func(b *testing.B) (args []string, files []*os.File, server int, end func())
}

func ownDisk(_ *testing.B, c *readClosure) *transport {
	return &transport{name: "nbd", modules: []string{"erofs"}, mount: "erofs,/dev/vda,", start: func(b *testing.B) ([]string, []*os.File, int, func()) {
		image, err := NewImage(c.images)
		if err != nil {
			b.Fatal(err)
		}
		disk := NewDisk()
		if err := disk.Bind(image, image.Size()); err != nil {
			b.Fatal(err)
		}
		ours, theirs, err := socketPairs(1)
		if err != nil {
			b.Fatal(err)
		}
		server := disk.Serve(oneConn(ours[0]), slog.New(slog.DiscardHandler))
		return []string{"-blockdev", socketDisk("in0", 3) + ",read-only=on", "-device", "virtio-blk-pci,drive=in0"}, theirs, 0, func() {
			closeAll(theirs)
			if err := server.Close(); err != nil {
				b.Error(err)
			}
		}
	}}
}

func rawImage(b *testing.B, c *readClosure) *transport {
	t := &transport{name: "image-file", modules: []string{"erofs"}, mount: "erofs,/dev/vda,"}
	if _, err := exec.LookPath("mkfs.erofs"); err != nil {
		t.lacks = "mkfs.erofs (Debian: erofs-utils)"
		return t
	}
	path := filepath.Join(b.TempDir(), "image")
	if out, err := exec.Command("mkfs.erofs", path, c.dir).CombinedOutput(); err != nil {
		b.Fatalf("%v\n%s", err, out)
	}
	t.start = func(*testing.B) ([]string, []*os.File, int, func()) {
		return []string{"-blockdev", "driver=raw,node-name=in0,read-only=on,file.driver=file,file.filename=" + path, "-device", "virtio-blk-pci,drive=in0"}, nil, 0, func() {}
	}
	return t
}

func virtioFS(b *testing.B, c *readClosure) *transport {
	t := &transport{name: "virtiofs", modules: []string{"virtiofs"}, mount: "virtiofs,files,"}
	socket := filepath.Join(b.TempDir(), "virtiofs")
	var command []string
	for _, own := range [][]string{
		{"/usr/libexec/virtiofsd", "--socket-path=" + socket, "--shared-dir=" + c.dir, "--cache=always", "--rlimit-nofile=200000"},
		{"/usr/lib/qemu/virtiofsd", "--socket-path=" + socket, "-o", "source=" + c.dir, "-o", "cache=always", "--rlimit-nofile=200000"},
	} {
		if _, err := os.Stat(own[0]); err == nil && command == nil {
			command = own
		}
	}
	if command == nil {
		t.lacks = "virtiofsd (Debian: virtiofsd, or qemu-system-common in Debian 12)"
		return t
	}
	// It keeps each file open that the guest has seen.
	var open unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &open); err != nil {
		b.Fatal(err)
	}
	if open.Max < uint64(2*c.files) {
		t.lacks = fmt.Sprintf("limit of open files (ulimit -Hn) of twice as many as there are files, but one of %d: try fewer, -benchfiles", open.Max)
	}
	t.start = func(b *testing.B) ([]string, []*os.File, int, func()) {
		os.Remove(socket) // of the one before, if there was one
		cmd := exec.Command(command[0], command[1:]...)
		var said bytes.Buffer
		cmd.Stderr = &said
		if err := cmd.Start(); err != nil {
			b.Fatal(err)
		}
		for start := time.Now(); ; time.Sleep(10 * time.Millisecond) {
			if _, err := os.Stat(socket); err == nil {
				break
			}
			if time.Since(start) > 20*time.Second {
				b.Fatalf("virtiofsd does not start: %s", said.String())
			}
		}
		return []string{"-chardev", "socket,id=fs,path=" + socket, "-device", "vhost-user-fs-pci,chardev=fs,tag=files"}, nil, cmd.Process.Pid, func() {
			cmd.Process.Kill() // it has ended if QEMU has
			cmd.Wait()         // with whatever status
		}
	}
	return t
}

func nineP(_ *testing.B, c *readClosure) *transport {
	return &transport{name: "9p", modules: []string{"9pnet_virtio", "9p"}, mount: "9p,files,trans=virtio:version=9p2000.L:msize=512000:cache=loose",
		start: func(*testing.B) ([]string, []*os.File, int, func()) {
			return []string{"-fsdev", "local,id=fs,security_model=none,readonly=on,path=" + c.dir, "-device", "virtio-9p-pci,fsdev=fs,mount_tag=files"}, nil, 0, func() {}
		}}
}

func (t *transport) benchmark(b *testing.B, c *readClosure) {
	if t.lacks != "" {
		b.Skip("not measured: there is no " + t.lacks)
	}
	modules, err := loadModules(c.kernel.Modules, append([]string{"virtio_pci", "virtio_blk"}, t.modules...))
	if err != nil {
		b.Fatal(err)
	}
	last := t.modules[len(t.modules)-1]
	if !bytes.Contains(moduleNames(modules), []byte(last)) && last != "erofs" {
		b.Skip("not measured: the kernel has no " + last)
	}
	initrd := filepath.Join(b.TempDir(), "initrd")
	f, err := os.Create(initrd)
	if err == nil {
		err = errors.Join(writeInitrd(f, c.reader, "", modules, nil), f.Close())
	}
	if err != nil {
		b.Fatal(err)
	}
	var sum [3]readSample
	for b.Loop() {
		at := t.run(b, c, initrd)
		for i := range sum {
			sum[i].cpu += at[i].cpu
			sum[i].wall += at[i].wall
		}
	}
	n := float64(b.N)
	for i, name := range []string{"walk", "read"} {
		b.ReportMetric((sum[i+1].cpu-sum[i].cpu).Seconds()/n, name+"-cpu-s")
		b.ReportMetric((sum[i+1].wall-sum[i].wall).Seconds()/n, name+"-s")
	}
}

func moduleNames(modules []module) []byte {
	var names []byte
	for _, m := range modules {
		names = append(append(names, m.name...), ' ')
	}
	return names
}

// A readSample is what time it was, and how much CPU time was used.
type readSample struct{ wall, cpu time.Duration }

// run boots one guest and returns the times when it began to walk, began to read,
// and had read all.
func (t *transport) run(b *testing.B, c *readClosure, initrd string) (at [3]readSample) {
	args, files, server, end := t.start(b)
	defer end()
	p, err := hostArch()
	if err != nil {
		b.Fatal(err)
	}
	qemu := exec.Command(p.qemu, append([]string{
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-M", p.machine + ",memory-backend=mem0", "-accel", "tcg,thread=multi", "-cpu", p.cpuTCG, "-smp", "1", "-m", "1024M",
		"-object", "memory-backend-memfd,id=mem0,size=1024M,share=on",
		"-kernel", c.kernel.Image, "-initrd", initrd, "-serial", "stdio",
		"-append", strings.Join(append([]string{"quiet panic=-1 console=" + p.console, "reader=" + t.mount}, p.parameters...), " "),
	}, args...)...)
	qemu.ExtraFiles = files
	var said bytes.Buffer
	qemu.Stderr = &said
	console, err := qemu.StdoutPipe()
	if err == nil {
		err = qemu.Start()
	}
	if err != nil {
		b.Fatal(err)
	}
	stop := time.AfterFunc(30*time.Minute, func() { qemu.Process.Kill() })
	defer stop.Stop()
	start, own := time.Now(), ownCPU(b)
	seen := 0
	lines := bufio.NewScanner(io.TeeReader(console, &said))
	for lines.Scan() {
		_, word, ok := strings.Cut(lines.Text(), "reader: ")
		if !ok {
			continue
		}
		if want := []string{"walk", "read", fmt.Sprintf("end %d %d", c.files, c.bytes)}; seen == 3 || strings.TrimSpace(word) != want[seen] {
			b.Errorf("the reader says %q", word)
			break
		}
		at[seen] = readSample{time.Since(start), ownCPU(b) - own + processCPU(b, qemu.Process.Pid) + processCPU(b, server)}
		seen++
	}
	qemu.Process.Kill() // it has ended unless something is wrong
	qemu.Wait()         // with whatever status
	if seen < 3 {
		b.Fatalf("the guest did not read its files:\n%s", said.String())
	}
	return at
}

// processCPU returns the CPU time of a process of ours; 0 stands for none.
func processCPU(b *testing.B, pid int) time.Duration {
	if pid == 0 {
		return 0
	}
	var t unix.Timespec
	// The CPU clock of a process, as clock_getcpuclockid(3) makes its number.
	if err := unix.ClockGettime(int32(^pid<<3|2), &t); err != nil {
		b.Error(err)
	}
	return time.Duration(t.Nano())
}
