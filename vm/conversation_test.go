package vm

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"net"
	"testing"
	"time"

	"nbd/nixproto/nar"
	"nbd/vm/link"
)

// A conversation is what a guest and its QEMU say during one build, as a list of
// steps, which is what fuzzing changes. A step is a byte that names it, two with
// a length, little endian, and as many bytes. See play for the kinds.

// The kinds of steps.
const (
	sayQMP     = iota // bytes on a port
	sayControl        // "
	sayLog            // "
	sayInputs         // "
	saySink           // "
	sayFrame          // a frame with that body
	sayMessage        // one of fakeMessages, named by the first byte
	sayWrite          // a write to the sink, which continues it
	sayOpen           // the handshakes of both disks
	sayKinds          // their number
)

// fakeMessages are what an honest guest may say, and what it may not.
var fakeMessages = []link.Message{
	&link.Started{}, &link.Outputs{Outputs: []link.OutputInfo{{Name: "out", Size: int64(len(fakeNAR))}}},
	&link.Result{Kind: link.Exited}, &link.Beat{}, &link.Hello{Version: link.Version}, &link.Awake{},
	&link.Result{Kind: link.Exited, ExitStatus: 1}, &link.Result{Kind: link.Internal, Message: "?"}, &link.BuildOrder{}, &link.Wake{},
}

// step returns a step as bytes.
func step(kind byte, b []byte) []byte {
	return append(binary.LittleEndian.AppendUint16([]byte{kind}, uint16(len(b))), b...)
}

// An earful is what the host says on a socket.
type earful struct {
	conn net.Conn
	more chan int // how many bytes came
}

func (e *earful) listen() {
	defer close(e.more)
	b := make([]byte, 64<<10)
	for {
		n, err := e.conn.Read(b)
		if err != nil {
			return
		}
		e.more <- n
	}
}

// wait waits for some bytes, or until it has been patient.
func (e *earful) wait(n int, patience time.Duration) {
	late := time.After(patience)
	for n > 0 {
		select {
		case got, ok := <-e.more:
			if !ok {
				return
			}
			n -= got
		case <-late:
			return
		}
	}
}

// drain forgets what else comes.
func (e *earful) drain() {
	for range e.more {
	}
}

// play says what the steps say on the other ends of a guest's sockets. It waits
// for the answer to a write.
func play(ends []net.Conn, steps []byte, patience time.Duration) {
	at := func(fd int) net.Conn { return ends[fd-fdQMP] }
	agent := link.Guest(at(fdControl))
	if _, err := agent.Receive(); err != nil { // the order
		return
	}
	var sink *earful
	for fd := fdQMP; fd <= fdSink; fd++ {
		e := &earful{at(fd), make(chan int)}
		go e.listen()
		if fd == fdSink {
			sink = e
			defer func() { go sink.drain() }()
		} else {
			go e.drain()
		}
	}
	written := uint64(0)
	for len(steps) >= 3 {
		kind, n := steps[0]%sayKinds, int(binary.LittleEndian.Uint16(steps[1:]))
		b := steps[3:][:min(n, len(steps)-3)]
		steps = steps[3+len(b):]
		switch kind {
		case sayQMP, sayControl, sayLog, sayInputs, saySink:
			at([]int{fdQMP, fdControl, fdLog, fdInputs, fdSink}[kind]).Write(b)
		case sayFrame:
			at(fdControl).Write(frame(uint32(len(b)), string(b)))
		case sayMessage:
			if len(b) > 0 {
				agent.Send(fakeMessages[int(b[0])%len(fakeMessages)])
			}
		case sayWrite:
			at(fdSink).Write(append(requestBytes(nbdRequest{nbdCmdWrite, 1, written, uint32(len(b))}), b...))
			written += uint64(len(b))
			sink.wait(nbdReplySize, patience)
		case sayOpen:
			for _, fd := range []int{fdInputs, fdSink} {
				at(fd).Write(append([]byte{0, 0, 0, 3}, optionBytes(nbdOptGo, goData(""))...))
			}
			sink.wait(18+20+12+20, patience) // greeting, information, acknowledgement
		}
	}
}

// converse runs a build with a guest that says what the steps say, and then ends
// its connections.
func converse(t *testing.T, steps []byte, patience time.Duration) (*Result, error, *memOutputs) {
	ends, files, err := socketPairs(fdSink - fdQMP + 1)
	if err != nil {
		t.Fatal(err)
	}
	var theirs []net.Conn
	for _, f := range files {
		c, err := net.FileConn(f)
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
		theirs = append(theirs, c)
		c.SetWriteDeadline(time.Now().Add(time.Minute))
	}
	fmt.Fprint(theirs[0], `{"QMP": {}}`+"\n"+`{"return": {}}`+"\n")
	scratch, err := memfd("scratch", 4096)
	if err != nil {
		t.Fatal(err)
	}
	g := &guestVM{machine: machine{accel: "kvm"}, console: new(console), scratch: scratch}
	g.ctx, g.cancel = context.WithCancelCause(t.Context())
	g.cleanup = append(g.cleanup, scratch.Close)
	outs := new(memOutputs)
	b := &build{r: &Runner{cfg: Config{Logger: slog.New(slog.DiscardHandler)}}, p: &platform{}, g: g, log: io.Discard, begun: newDone(),
		spec:  &Spec{BuildID: "1", Outputs: []Output{{Name: "out"}}, MemoryMiB: 1, MaxLog: 1 << 20},
		order: &link.BuildOrder{}}
	b.disks = guestDisks{inputs: NewDisk(), sink: NewSink(SinkConfig{Outputs: 1, Limit: 1 << 20,
		Create: func(i int) (OutputWriter, error) { return b.createOutput(g.ctx, outs, i) }})}
	if err := b.disks.inputs.Bind(bytes.NewReader(make([]byte, 4096)), 4096); err != nil {
		t.Fatal(err)
	}
	g.serve(ends, b.disks, slog.New(slog.DiscardHandler))
	if g.proc, err = startProcess(command{path: inPath(t, "sleep"), args: []string{"1000"}, uid: -1}); err != nil {
		t.Fatal(err)
	}
	if g.qmp, err = newQMP(g.ctx, ends[0].(*net.UnixConn)); err != nil {
		t.Fatal(err)
	}
	g.cleanup = append(g.cleanup, func() error { g.qmp.close(); return nil })
	go func() {
		play(theirs, steps, patience)
		for _, c := range theirs[1:] { // the end of QMP may be seen too soon
			c.(*net.UnixConn).CloseWrite()
		}
		g.proc.kill()
	}()
	defer closeAll(theirs)
	res, err := b.run(g.ctx)
	return res, b.end(t.Context(), err), outs
}

// honest is a conversation that ends well.
func honest() []byte {
	var b []byte
	b = append(b, step(sayOpen, nil)...)
	b = append(b, step(sayMessage, []byte{0})...)
	b = append(b, step(sayWrite, aligned(fakeNAR))...)
	b = append(b, step(sayMessage, []byte{3})...)
	b = append(b, step(sayMessage, []byte{1})...)
	return append(b, step(sayMessage, []byte{2})...)
}

// Whatever is said, a build ends at once when the guest has gone, and succeeds
// only if its outputs are whole.
func FuzzConversation(f *testing.F) {
	f.Add(honest())
	f.Add(append(step(sayQMP, []byte(`{"event": "GUEST_PANICKED", "data": {}}`+"\n")), honest()...))
	f.Add(append(step(sayLog, []byte("log\n")), honest()...))
	f.Add(append(honest()[:9], step(sayFrame, []byte(`{"type":"result","body":{"Kind":"exited","LogBytes":-1}}`))...))
	f.Add(append(step(sayOpen, nil), step(saySink, requestBytes(nbdRequest{nbdCmdWrite, 1, 1 << 63, 1<<32 - 1}))...))
	f.Add(append(step(sayOpen, nil), step(sayInputs, requestBytes(nbdRequest{nbdCmdRead, 1, 0, 4096}))...))
	f.Add(step(sayControl, []byte{0xff, 0xff, 0xff, 0xff, '{'}))
	f.Fuzz(func(t *testing.T, steps []byte) {
		hasten(t, 100)
		res, err, outs := converse(t, steps, 100*time.Millisecond)
		if err != nil {
			return
		}
		out := outs.nars["out"]
		if res == nil || out == nil || len(res.Produced) != 1 || outs.ends[0] != "out closed" {
			t.Fatalf("success of %+v with %+v", res, outs)
		}
		if _, _, err := nar.ReadIndex(bytes.NewReader(out.Bytes())); err != nil {
			t.Errorf("success with a NAR that is none: %v", err)
		}
	})
}

func TestHonestConversation(t *testing.T) {
	res, err, outs := converse(t, honest(), time.Minute)
	if err != nil || len(res.Produced) != 1 || !bytes.Equal(outs.nars["out"].Bytes(), fakeNAR) {
		t.Errorf("%+v, %v, %+v", res, err, outs)
	}
}
