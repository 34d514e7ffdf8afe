// Package link is what host and guest say to each other while a build runs:
// frames on the control port.
//
// A frame is a little-endian uint32, the length of what follows, and a JSON
// object {"type": …, "body": …}. The order is
//
//	guest: hello                      after booting (never after a restore)
//	host:  wake      guest: awake     entropy, time
//	host:  build     guest: started, then outputs (on success), then result
//	guest: beat                       every BeatInterval from awake on
//
// Each side bounds what it accepts: the guest trusts its host and takes build
// orders of up to MaxFromHost bytes; the host does not trust its guest and
// takes MaxFromGuest. A frame's length allocates nothing before bytes arrive.
package link

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
)

// Limits of a frame's length in bytes. A build order holds environment, passed
// files and reference graphs of thousands of paths, in base64.
const (
	MaxFromHost  = 64 << 20
	MaxFromGuest = 1 << 20
)

// ErrTooLong says that a frame is longer than its receiver accepts.
var ErrTooLong = errors.New("frame is too long")

// A Conn sends and receives messages over a byte stream. Any number of
// goroutines may send at once; one may receive at a time.
type Conn struct {
	r          io.Reader
	maxReceive uint32
	maxSend    uint32

	sendMu sync.Mutex // guards w: a frame is written whole
	w      io.Writer
}

// Host returns the host's end of a connection over rw.
func Host(rw io.ReadWriter) *Conn {
	return &Conn{r: rw, w: rw, maxReceive: MaxFromGuest, maxSend: MaxFromHost}
}

// Guest returns the guest's end of a connection over rw.
func Guest(rw io.ReadWriter) *Conn {
	return &Conn{r: rw, w: rw, maxReceive: MaxFromHost, maxSend: MaxFromGuest}
}

// Send writes one message. After an error the stream is of no further use,
// except when it is ErrTooLong: then nothing was written.
func (c *Conn) Send(m Message) error {
	frame, err := encode(m)
	if err != nil {
		return err
	}
	if len(frame)-4 > int(c.maxSend) {
		return fmt.Errorf("send %s: %d bytes: %w", m.messageType(), len(frame)-4, ErrTooLong)
	}
	c.sendMu.Lock()
	defer c.sendMu.Unlock()
	if _, err := c.w.Write(frame); err != nil {
		return fmt.Errorf("send %s: %w", m.messageType(), err)
	}
	return nil
}

// Receive reads one message. The error is io.EOF if the stream ends before a
// frame, io.ErrUnexpectedEOF if it ends within one.
func (c *Conn) Receive() (Message, error) {
	var head [4]byte
	if _, err := io.ReadFull(c.r, head[:]); err != nil {
		if errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			return nil, io.EOF
		}
		return nil, fmt.Errorf("receive frame: %w", err)
	}
	n := binary.LittleEndian.Uint32(head[:])
	if n > c.maxReceive {
		return nil, fmt.Errorf("receive frame: %d bytes: %w", n, ErrTooLong)
	}
	var body bytes.Buffer
	if _, err := io.CopyN(&body, c.r, int64(n)); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, fmt.Errorf("receive frame of %d bytes: %w", n, err)
	}
	return decode(body.Bytes())
}

// envelope is the JSON object of a frame.
type envelope struct {
	Type string          `json:"type"`
	Body json.RawMessage `json:"body"`
}

// encode returns the frame of a message, its length included.
func encode(m Message) ([]byte, error) {
	var b bytes.Buffer
	b.Write(make([]byte, 4))
	fmt.Fprintf(&b, `{"type":%q,"body":`, m.messageType())
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(m); err != nil {
		return nil, fmt.Errorf("encode %s: %w", m.messageType(), err)
	}
	b.WriteByte('}')
	frame := b.Bytes()
	if uint64(len(frame)-4) > uint64(^uint32(0)) {
		return nil, fmt.Errorf("encode %s: %w", m.messageType(), ErrTooLong)
	}
	binary.LittleEndian.PutUint32(frame, uint32(len(frame)-4))
	return frame, nil
}

// decode parses what follows a frame's length.
func decode(frame []byte) (Message, error) {
	var e envelope
	if err := strict(frame, &e); err != nil {
		return nil, fmt.Errorf("decode frame: %w", err)
	}
	m := newMessage(e.Type)
	if m == nil {
		return nil, fmt.Errorf("decode frame: unknown type %.40q", e.Type)
	}
	if err := strict(e.Body, m); err != nil {
		return nil, fmt.Errorf("decode %s: %w", e.Type, err)
	}
	return m, nil
}

// Warm sends each message to itself. What encoding and decoding have to learn
// about types they know afterwards, and clones of a guest that was saved then
// do not learn it again.
func Warm() error {
	for _, m := range []Message{
		&Hello{}, &Wake{Entropy: []byte{0}}, &Awake{}, &Beat{}, &Started{},
		&BuildOrder{Args: [][]byte{{0}}, Env: [][]byte{{0}}, Files: []File{{}}, Inputs: []string{""}, Outputs: []Output{{}}},
		&Outputs{Outputs: []OutputInfo{{}}}, &Result{},
	} {
		frame, err := encode(m)
		if err != nil {
			return err
		}
		if _, err := decode(frame[4:]); err != nil {
			return err
		}
	}
	return nil
}

// strict parses one JSON value and nothing behind it.
func strict(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if _, err := d.Token(); err != io.EOF {
		return errors.New("something follows the value")
	}
	return nil
}
