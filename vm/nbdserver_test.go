package vm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// boundDisk returns a disk with content.
func boundDisk(t testing.TB, content string) *Disk {
	t.Helper()
	d := NewDisk()
	if err := d.Bind(strings.NewReader(content), int64(len(content))); err != nil {
		t.Fatal(err)
	}
	return d
}

// TestNBDQEMU has QEMU's own client read a disk, before and after it gets its
// content.
func TestNBDQEMU(t *testing.T) {
	qemuIO, qemuImg := tool(t, "qemu-io", "qemu-utils"), tool(t, "qemu-img", "qemu-utils")
	d := NewDisk()
	url := "nbd+unix:///?socket=" + serveTest(t, d)
	run := func(name string, args ...string) string {
		t.Helper()
		out, err := exec.Command(name, args...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s %q: %v\n%s", name, args, err, out)
		}
		return string(out)
	}
	if out := run(qemuImg, "info", url); !strings.Contains(out, "(1099511627776 bytes)") {
		t.Errorf("qemu-img info:\n%s", out)
	}
	run(qemuIO, "-r", "-f", "raw", "-c", "read -P 0 0 1M", "-c", "read -P 0 1099511562240 64k", url)

	content := bytesOf(3<<20 + 12345)
	if err := d.Bind(strings.NewReader(content), int64(len(content))); err != nil {
		t.Fatal(err)
	}
	to := filepath.Join(t.TempDir(), "copy")
	run(qemuImg, "dd", "-f", "raw", "-O", "raw", "bs=1M", "count=5", "if="+url, "of="+to)
	got, err := os.ReadFile(to)
	if err != nil {
		t.Fatal(err)
	}
	if want := content + string(make([]byte, 5<<20-len(content))); string(got) != want {
		t.Error("the copy by qemu-img dd differs")
	}
	if out, err := exec.Command(qemuIO, "-f", "raw", "-c", "write 0 4k", url).CombinedOutput(); err == nil {
		t.Errorf("qemu-io writes to a read-only disk:\n%s", out)
	}
	out := run(qemuImg, "bench", "-f", "raw", "-c", "2000", "-d", "32", "-s", "4096", "-S", "8192", url)
	t.Log(out)
}

func TestNBDHandshake(t *testing.T) {
	path := serveTest(t, boundDisk(t, "content"))
	c := dialNBD(t, path)
	if err := c.hello(3); err != nil {
		t.Fatal(err)
	}
	for _, o := range []struct {
		name string
		opt  uint32
		data []byte
		want []uint32
	}{
		{"STARTTLS", 5, nil, []uint32{nbdRepErrUnsup}},
		{"STRUCTURED_REPLY", 8, nil, []uint32{nbdRepErrUnsup}},
		{"SET_META_CONTEXT", 10, []byte("whatever"), []uint32{nbdRepErrUnsup}},
		{"EXTENDED_HEADERS", 11, nil, []uint32{nbdRepErrUnsup}},
		{"unknown", 12345, make([]byte, nbdMaxOption), []uint32{nbdRepErrUnsup}},
		{"LIST", nbdOptList, nil, []uint32{nbdRepServer, nbdRepAck}},
		{"LIST with data", nbdOptList, []byte("x"), []uint32{nbdRepErrInvalid}},
		{"INFO", nbdOptInfo, goData(""), []uint32{nbdRepInfo, nbdRepAck}},
		{"INFO of block sizes", nbdOptInfo, goData("", 9, 3, 1), []uint32{nbdRepInfo, nbdRepInfo, nbdRepAck}},
		{"INFO of another export", nbdOptInfo, goData("other"), []uint32{nbdRepErrUnknown}},
		{"INFO without data", nbdOptInfo, nil, []uint32{nbdRepErrInvalid}},
		{"GO cut", nbdOptGo, goData("", 3)[:7], []uint32{nbdRepErrInvalid}},
		{"GO with a long name", nbdOptGo, []byte{0xff, 0xff, 0xff, 0xff, 0, 0}, []uint32{nbdRepErrInvalid}},
		{"GO with more", nbdOptGo, append(goData(""), 0), []uint32{nbdRepErrInvalid}},
		{"GO", nbdOptGo, goData("", 3), []uint32{nbdRepInfo, nbdRepInfo, nbdRepAck}},
	} {
		replies, err := c.option(o.opt, o.data)
		if err != nil {
			t.Fatalf("%s: %v", o.name, err)
		}
		var got []uint32
		for _, r := range replies {
			got = append(got, r.kind)
		}
		if fmt.Sprint(got) != fmt.Sprint(o.want) {
			t.Errorf("%s: replies %x, want %x", o.name, got, o.want)
		}
	}
	go c.receive()
	p := make([]byte, 7)
	if err := c.read(p, 0); err != nil || string(p) != "content" {
		t.Errorf("read = %q, %v", p, err)
	}
}

// TestNBDHandshakeEnds has the handshakes that end the connection.
func TestNBDHandshakeEnds(t *testing.T) {
	path := serveTest(t, boundDisk(t, "content"))
	for name, send := range map[string][]byte{
		"unknown flags":  {0, 0, 0, 7},
		"bad magic":      append([]byte{0, 0, 0, 3}, make([]byte, 16)...),
		"long option":    append([]byte{0, 0, 0, 3}, optionBytes(3, make([]byte, nbdMaxOption+1))...),
		"abort":          append([]byte{0, 0, 0, 3}, optionBytes(nbdOptAbort, nil)...),
		"unknown export": append([]byte{0, 0, 0, 3}, optionBytes(nbdOptExportName, []byte("other"))...),
		"too many options": append([]byte{0, 0, 0, 3},
			bytes.Repeat(optionBytes(8, nil), nbdMaxOptions)...),
		"request without magic": append(append([]byte{0, 0, 0, 3}, optionBytes(nbdOptGo, goData(""))...), make([]byte, 28)...),
	} {
		t.Run(name, func(t *testing.T) {
			c := dialNBD(t, path)
			if err := c.conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
				t.Fatal(err)
			}
			if _, err := c.conn.Write(send); err != nil {
				t.Fatal(err)
			}
			// What was not read when the server closed makes the end a reset.
			if _, err := io.Copy(io.Discard, c.conn); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("the connection goes on: %v", err)
			}
		})
	}
}

// TestNBDExportName has the handshake of clients from before NBD_OPT_GO, with
// and without the zeros.
func TestNBDExportName(t *testing.T) {
	path := serveTest(t, boundDisk(t, "content"))
	for flags, n := range map[uint32]int{1: 134, 3: 10} {
		c := dialNBD(t, path)
		if err := c.hello(flags); err != nil {
			t.Fatal(err)
		}
		if _, err := c.conn.Write(optionBytes(nbdOptExportName, nil)); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, n)
		if _, err := io.ReadFull(c.r, b); err != nil {
			t.Fatal(err)
		}
		if binary.BigEndian.Uint64(b) != DiskSize || b[9]&nbdTransReadOnly == 0 {
			t.Errorf("export %x", b)
		}
		go c.receive()
		p := make([]byte, 7)
		if err := c.read(p, 0); err != nil || string(p) != "content" {
			t.Errorf("read = %q, %v", p, err)
		}
	}
}

// TestNBDRequests has requests that are refused, and goes on after each.
func TestNBDRequests(t *testing.T) {
	content := bytesOf(100_000)
	c := connectNBD(t, serveTest(t, boundDisk(t, content)))
	if c.flags != nbdTransHasFlags|nbdTransReadOnly|nbdTransMultiConn {
		t.Errorf("flags = %#x", c.flags)
	}
	for _, r := range []struct {
		name    string
		command uint16
		off     uint64
		length  uint32
		payload int
		want    error
	}{
		{"read past the end", nbdCmdRead, DiskSize, 1, 0, errno(nbdEINVAL)},
		{"read over the end", nbdCmdRead, DiskSize - 1, 2, 0, errno(nbdEINVAL)},
		{"read from far away", nbdCmdRead, 1<<64 - 1, 2, 0, errno(nbdEINVAL)},
		{"read too much", nbdCmdRead, 0, nbdMaxRequest + 1, 0, errno(nbdEINVAL)},
		{"write", nbdCmdWrite, 0, 300_000, 300_000, errno(nbdEPERM)},
		{"trim", nbdCmdTrim, 0, 4096, 0, errno(nbdEPERM)},
		{"write zeros", nbdCmdWriteZeroes, 0, 4096, 0, errno(nbdEPERM)},
		{"block status", 7, 0, 4096, 0, errno(nbdEINVAL)},
		{"unknown", 99, 0, 4096, 0, errno(nbdEINVAL)},
		{"flush", nbdCmdFlush, 0, 0, 0, nil},
		{"read nothing", nbdCmdRead, 5, 0, 0, nil},
		{"read nothing at the end", nbdCmdRead, DiskSize, 0, 0, nil},
	} {
		if err := c.do(r.command, r.off, r.length, make([]byte, r.payload), nil); err != r.want {
			t.Errorf("%s: %v, want %v", r.name, err, r.want)
		}
		p := make([]byte, 5)
		if err := c.read(p, 10); err != nil || string(p) != content[10:15] {
			t.Fatalf("read after %s: %v", r.name, err)
		}
	}
	if _, err := c.call(nbdCmdDisc, 0, 0, nil, nil); err != nil {
		t.Fatal(err)
	}
	if err := c.read(make([]byte, 1), 0); err == nil {
		t.Error("read after NBD_CMD_DISC")
	}
}

// TestNBDHugeWriteEnds says that nobody reads what a mad client announces.
func TestNBDHugeWriteEnds(t *testing.T) {
	c := connectNBD(t, serveTest(t, NewDisk()))
	if err := c.do(nbdCmdWrite, 0, 1<<32-1, nil, nil); err == nil {
		t.Error("a write of 4 GiB was taken")
	}
}

// TestNBDReads reads pieces of all sizes, many at a time, over two connections.
func TestNBDReads(t *testing.T) {
	content := bytesOf(4 << 20)
	path := serveTest(t, boundDisk(t, content))
	whole := content + string(make([]byte, 40<<20))
	var wg sync.WaitGroup
	for i := range 2 {
		c := connectNBD(t, path)
		for j := range 20 {
			r := rand.New(rand.NewPCG(uint64(i), uint64(j)))
			wg.Go(func() {
				for range 20 {
					off := r.Int64N(5 << 20)
					p := make([]byte, r.IntN(1<<r.IntN(22)))
					if err := c.read(p, off); err != nil || string(p) != whole[off:off+int64(len(p))] {
						t.Errorf("read of %d at %d: %v, or different", len(p), off, err)
					}
				}
			})
		}
		p := make([]byte, nbdMaxRequest)
		if err := c.read(p, 1); err != nil || string(p) != whole[1:1+len(p)] {
			t.Errorf("read of the largest size: %v, or different", err)
		}
	}
	wg.Wait()
}

// slowReader lets reads wait for each other.
type slowReader struct{ meet chan struct{} }

func (s slowReader) ReadAt(p []byte, off int64) (int, error) {
	if off == 0 {
		<-s.meet
	} else {
		s.meet <- struct{}{}
	}
	return len(p), nil
}

// TestNBDConcurrent says that a read does not wait for the one before it.
func TestNBDConcurrent(t *testing.T) {
	d := NewDisk()
	if err := d.Bind(slowReader{make(chan struct{})}, 1<<20); err != nil {
		t.Fatal(err)
	}
	c := connectNBD(t, serveTest(t, d))
	first, err := c.call(nbdCmdRead, 0, 10, nil, make([]byte, 10))
	if err != nil {
		t.Fatal(err)
	}
	if err := c.read(make([]byte, 10), 4096); err != nil {
		t.Fatal(err)
	}
	if err := <-first.done; err != nil {
		t.Fatal(err)
	}
}

// TestDiskFails says that an error of the content is told to the guest and to
// the runner.
func TestDiskFails(t *testing.T) {
	bad := errors.New("bad sector")
	for name, c := range map[string]struct {
		src  io.ReaderAt
		want error
	}{
		"error": {broken{bad}, bad},
		"short": {strings.NewReader("short"), io.ErrUnexpectedEOF},
	} {
		d := NewDisk()
		if err := d.Bind(c.src, 1<<20); err != nil {
			t.Fatal(err)
		}
		client := connectNBD(t, serveTest(t, d))
		if err := d.Err(); err != nil {
			t.Errorf("%s: failed before a read: %v", name, err)
		}
		if err := client.read(make([]byte, 100), 0); err != errno(nbdEIO) {
			t.Errorf("%s: read: %v", name, err)
		}
		<-d.Failed()
		if err := d.Err(); !errors.Is(err, c.want) {
			t.Errorf("%s: Err = %v, want %v", name, err, c.want)
		}
	}
}

// TestDiskFailsLate has an error in the middle of a read whose first part is
// sent already.
func TestDiskFailsLate(t *testing.T) {
	d := NewDisk()
	if err := d.Bind(strings.NewReader(bytesOf(nbdBuffer)), 1<<20); err != nil {
		t.Fatal(err)
	}
	c := connectNBD(t, serveTest(t, d))
	if err := c.read(make([]byte, 2*nbdBuffer), 0); err == nil {
		t.Error("read of what is not there")
	}
	<-d.Failed()
}

func TestDiskBind(t *testing.T) {
	d := NewDisk()
	if err := d.Bind(zeros{}, DiskSize+1); err == nil {
		t.Error("content larger than the disk")
	}
	if err := d.Bind(zeros{}, -1); err == nil {
		t.Error("content of negative size")
	}
	if err := d.Bind(zeros{}, DiskSize); err != nil {
		t.Error(err)
	}
	if err := d.Bind(zeros{}, 1); err == nil {
		t.Error("content bound twice")
	}
}

// TestNBDClose closes a server while clients are idle, in the middle of a
// handshake, or wait for a read that hangs until then.
func TestNBDClose(t *testing.T) {
	d := NewDisk()
	meet := make(chan struct{})
	if err := d.Bind(slowReader{meet}, 1<<20); err != nil {
		t.Fatal(err)
	}
	l, path := listenNBD(t)
	s := serveNBD(l, d, nil)
	idle, half, busy := connectNBD(t, path), dialNBD(t, path), connectNBD(t, path)
	if err := half.hello(3); err != nil {
		t.Fatal(err)
	}
	call, err := busy.call(nbdCmdRead, 0, 10, nil, make([]byte, 10))
	if err != nil {
		t.Fatal(err)
	}
	closed := make(chan error)
	go func() { closed <- s.Close() }()
	if err := <-call.done; err == nil {
		t.Error("read of a closed server")
	}
	select {
	case <-closed:
		t.Error("Close did not wait for a read")
	default:
	}
	close(meet)
	if err := <-closed; err != nil {
		t.Error(err)
	}
	if err := idle.read(make([]byte, 1), 0); err == nil {
		t.Error("read of a closed server")
	}
	if _, err := net.Dial("unix", path); err == nil {
		t.Error("closed server takes connections")
	}
	if err := s.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
}

// TestNBDTooMany says that clients past the bound are sent away, and welcome
// again when others left.
func TestNBDTooMany(t *testing.T) {
	path := serveTest(t, NewDisk())
	var clients []*nbdClient
	for range nbdMaxConns {
		clients = append(clients, connectNBD(t, path))
	}
	extra := dialNBD(t, path)
	if err := extra.hello(3); err == nil {
		t.Error("one client too many was greeted")
	}
	if _, err := clients[0].call(nbdCmdDisc, 0, 0, nil, nil); err != nil {
		t.Fatal(err)
	}
	for range 1000 { // the server notices in its own time
		if c := dialNBD(t, path); c.hello(3) == nil {
			return
		}
	}
	t.Error("no room after a client left")
}

// FuzzNBD says anything to a server of a disk or a sink. The first bytes of a
// session are given, so that it gets somewhere.
func FuzzNBD(f *testing.F) {
	var session []byte
	for _, r := range []nbdRequest{{nbdCmdRead, 1, 0, 4096}, {nbdCmdRead, 2, 1 << 39, 1 << 20}, {nbdCmdWrite, 3, 0, 8},
		{nbdCmdFlush, 4, 0, 0}, {nbdCmdTrim, 5, 0, 4096}, {nbdCmdWriteZeroes, 6, 0, 4096}, {nbdCmdDisc, 7, 0, 0}} {
		session = append(session, requestBytes(r)...)
		if r.command == nbdCmdWrite {
			session = append(session, 13, 0, 0, 0, 0, 0, 0, 0)
		}
	}
	f.Add(optionBytes(nbdOptGo, goData("", 3)), session, false)
	f.Add(optionBytes(nbdOptGo, goData("", 3)), session, true)
	f.Add(optionBytes(nbdOptExportName, nil), session, true)
	f.Add(append(optionBytes(8, nil), optionBytes(nbdOptList, nil)...), []byte{}, false)
	f.Fuzz(func(t *testing.T, options, requests []byte, sink bool) {
		var disk export = boundDisk(t, "content")
		if sink {
			disk = NewSink(SinkConfig{Outputs: 1, Limit: 1 << 20, Create: func(int) (OutputWriter, error) { return new(testOutput), nil }})
		}
		ours, theirs := net.Pipe()
		done := make(chan struct{})
		go func() {
			newNBDConn(theirs, disk).serve()
			theirs.Close()
			close(done)
		}()
		go io.Copy(io.Discard, ours)
		for _, b := range [][]byte{{0, 0, 0, 3}, options, requests} {
			if _, err := ours.Write(b); err != nil {
				break // the server had enough
			}
		}
		ours.Close()
		<-done
	})
}

// BenchmarkNBDRead reads 4 KiB at random and 1 MiB in order, by itself and with
// eight reads under way.
func BenchmarkNBDRead(b *testing.B) {
	path := filepath.Join(b.TempDir(), "content")
	if err := os.WriteFile(path, []byte(bytesOf(64<<20)), 0o600); err != nil {
		b.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	d := NewDisk()
	if err := d.Bind(f, 64<<20); err != nil {
		b.Fatal(err)
	}
	socket := serveTest(b, d)
	for _, c := range []struct{ size, depth int }{{4 << 10, 1}, {4 << 10, 8}, {128 << 10, 8}, {1 << 20, 1}} {
		b.Run(fmt.Sprintf("%dKiB-depth%d", c.size>>10, c.depth), func(b *testing.B) {
			client := connectNBD(b, socket)
			b.SetBytes(int64(c.size))
			b.ResetTimer()
			var wg sync.WaitGroup
			for i := range c.depth {
				wg.Go(func() {
					r := rand.New(rand.NewPCG(uint64(i), 0))
					p := make([]byte, c.size)
					for range (b.N + c.depth - 1) / c.depth {
						if err := client.read(p, r.Int64N(63<<20)&^4095); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
		})
	}
}
