package vm

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
)

// QMP is QEMU's control protocol: JSON objects, one a line, each way (QEMU's
// docs/interop/qmp-spec.rst). The guest may have taken over QEMU, so what comes
// is bounded and a surprise is an error.

// maxQMPLine bounds one message. The largest that comes is the greeting, with
// less than 1 KiB.
const maxQMPLine = 256 << 10

// qmpEvents is how many events may wait for their reader; more end the
// connection. A guest can cause some kinds at will.
const qmpEvents = 256

// errQMPClosed says that QEMU closed the control socket, which it does by
// ending.
var errQMPClosed = errors.New("QEMU closed its control socket")

// A qmpError is QEMU's refusal of a command.
type qmpError struct {
	Class string `json:"class"`
	Desc  string `json:"desc"`
}

func (e *qmpError) Error() string { return e.Desc }

// A qmpEvent is something that happened to the guest.
type qmpEvent struct {
	Name string
	Data struct {
		Status  string `json:"status"`  // MIGRATION
		Reason  string `json:"reason"`  // SHUTDOWN
		NoSpace bool   `json:"nospace"` // BLOCK_IO_ERROR: the host's disk is full
	}
}

// A qmpMessage is any line from QEMU.
type qmpMessage struct {
	Greeting json.RawMessage `json:"QMP"`
	Return   json.RawMessage `json:"return"`
	Error    *qmpError       `json:"error"`
	Event    string          `json:"event"`
	Data     json.RawMessage `json:"data"`
}

// decodeQMP parses one line.
func decodeQMP(line []byte) (qmpMessage, error) {
	var m qmpMessage
	if err := json.Unmarshal(line, &m); err != nil {
		return m, fmt.Errorf("read QMP message: %w", err)
	}
	return m, nil
}

// event returns the event that the message tells of.
func (m qmpMessage) event() (qmpEvent, error) {
	e := qmpEvent{Name: m.Event}
	if len(m.Data) == 0 {
		return e, nil
	}
	if err := json.Unmarshal(m.Data, &e.Data); err != nil {
		return e, fmt.Errorf("read QMP event %.40q: %w", m.Event, err)
	}
	return e, nil
}

// A qmp is a connection to one QEMU.
type qmp struct {
	conn *net.UnixConn
	// events carries what happens; it is closed when the connection has ended.
	events chan qmpEvent

	mu      sync.Mutex // one command at a time
	replies chan qmpMessage
	done    chan struct{} // closed when the reader has ended
	err     error         // why; read after done
}

// newQMP takes over conn and negotiates.
func newQMP(ctx context.Context, conn *net.UnixConn) (*qmp, error) {
	q := &qmp{
		conn:    conn,
		events:  make(chan qmpEvent, qmpEvents),
		replies: make(chan qmpMessage, 1),
		done:    make(chan struct{}),
	}
	greeted := make(chan struct{})
	go q.read(greeted)
	select {
	case <-greeted:
	case <-q.done:
		conn.Close()
		return nil, q.err
	case <-ctx.Done():
		q.close()
		return nil, context.Cause(ctx)
	}
	if err := q.do(ctx, "qmp_capabilities", nil, nil, nil); err != nil {
		q.close()
		return nil, err
	}
	return q, nil
}

// close ends the connection and waits for its reader.
func (q *qmp) close() {
	q.conn.Close()
	<-q.done
}

// read hands out what QEMU says until the connection ends.
func (q *qmp) read(greeted chan<- struct{}) {
	defer close(q.done)
	defer close(q.events)
	lines := bufio.NewReaderSize(q.conn, maxQMPLine)
	first := true
	for {
		line, err := lines.ReadSlice('\n')
		if err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) || errors.Is(err, syscall.ECONNRESET) {
				err = errQMPClosed
			}
			q.err = err
			return
		}
		m, err := decodeQMP(line)
		if err != nil {
			q.err = err
			return
		}
		switch {
		case first:
			if m.Greeting == nil {
				q.err = errors.New("read QMP greeting: something else came")
				return
			}
			first = false
			close(greeted)
		case m.Event != "":
			e, err := m.event()
			if err != nil {
				q.err = err
				return
			}
			select {
			case q.events <- e:
			default:
				q.err = errors.New("QMP events come faster than they are read")
				return
			}
		default:
			select {
			case q.replies <- m:
			default:
				q.err = errors.New("QMP reply without a command")
				return
			}
		}
	}
}

// do runs a command and decodes its result unless result is nil. A descriptor,
// if given, goes with it (SCM_RIGHTS). Refusals wrap a *qmpError.
func (q *qmp) do(ctx context.Context, name string, args map[string]any, fd *os.File, result any) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	request := map[string]any{"execute": name}
	if args != nil {
		request["arguments"] = args
	}
	line, err := json.Marshal(request)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	var rights []byte
	if fd != nil {
		rights = syscall.UnixRights(int(fd.Fd()))
	}
	// The connection is of no more use when ctx ends: a reply may still come.
	stop := context.AfterFunc(ctx, func() { q.conn.Close() })
	defer stop()
	if _, _, err := q.conn.WriteMsgUnix(append(line, '\n'), rights, nil); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	select {
	case m := <-q.replies:
		if m.Error != nil {
			return fmt.Errorf("%s: %w", name, m.Error)
		}
		if result == nil {
			return nil
		}
		if err := json.Unmarshal(m.Return, result); err != nil {
			return fmt.Errorf("%s: read result: %w", name, err)
		}
		return nil
	case <-q.done:
		return fmt.Errorf("%s: %w", name, cmp.Or(context.Cause(ctx), q.err))
	case <-ctx.Done():
		return fmt.Errorf("%s: %w", name, context.Cause(ctx))
	}
}

// migrate saves the guest to, or with "migrate-incoming" restores it from, the
// file, whose memory is elsewhere (x-ignore-shared), and waits for the end.
// Other events on the way are lost. QEMU's own sandbox forbids the ways that
// start a process, hence the handed descriptor.
func (q *qmp) migrate(ctx context.Context, direction string, state *os.File) error {
	caps := []map[string]any{
		{"capability": "x-ignore-shared", "state": true},
		{"capability": "events", "state": true},
	}
	if err := q.do(ctx, "migrate-set-capabilities", map[string]any{"capabilities": caps}, nil, nil); err != nil {
		return err
	}
	if direction == "migrate" {
		if err := q.do(ctx, "stop", nil, nil, nil); err != nil {
			return err
		}
	}
	if err := q.do(ctx, "getfd", map[string]any{"fdname": "st"}, state, nil); err != nil {
		return err
	}
	if err := q.do(ctx, direction, map[string]any{"uri": "fd:st"}, nil, nil); err != nil {
		return err
	}
	for {
		select {
		case e, ok := <-q.events:
			switch {
			case !ok:
				return fmt.Errorf("%s: %w", direction, q.err)
			case e.Name == "MIGRATION" && e.Data.Status == "completed":
				return nil
			case e.Name == "MIGRATION" && e.Data.Status == "failed":
				return fmt.Errorf("%s: QEMU says that it failed", direction)
			}
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", direction, context.Cause(ctx))
		}
	}
}
