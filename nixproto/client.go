package nixproto

import (
	"fmt"
	"io"
)

// A Client speaks the worker protocol from the client's side, one operation
// after the other. It starts no goroutine: while it sends a stream it does not
// read, so a server that says much meanwhile needs room in the connection.
type Client struct {
	Reader  *Reader // stands behind the last answer; a NAR after it is read here
	Writer  *Writer
	Version Version // what both sides speak
	Server  Hello   // what the server said of itself

	log func(LogMessage)
}

// NewClient opens the protocol over conn. log is called for each message of the
// server but the last of an operation; it may be nil. A server that refuses the
// client makes a *LogError.
func NewClient(conn io.ReadWriter, mine Hello, log func(LogMessage)) (*Client, error) {
	if log == nil {
		log = func(LogMessage) {}
	}
	c := &Client{Reader: NewReader(conn), Writer: NewWriter(conn), log: log}
	var err error
	if c.Server, c.Version, err = ClientHandshake(c.Reader, c.Writer, mine); err != nil {
		return nil, err
	}
	if err := c.Wait(); err != nil {
		return nil, err
	}
	return c, nil
}

// Do sends an operation and returns its answer; see the request for its type.
// body writes the framed stream that follows some of the operations, and is nil
// for all others. A server's error is a *LogError, and the connection goes on.
func (c *Client) Do(req Request, body func(*Writer) error) (Response, error) {
	if err := WriteRequest(c.Writer, c.Version, req); err != nil {
		return nil, err
	}
	if body != nil {
		if err := c.stream(body); err != nil {
			return nil, fmt.Errorf("send the stream of %s: %w", req.Op(), err)
		}
	}
	if err := c.Writer.Flush(); err != nil {
		return nil, err
	}
	if err := c.Wait(); err != nil {
		return nil, err
	}
	return ReadResponse(c.Reader, c.Version, req)
}

// stream sends what body writes in frames of the size of a Writer's buffer.
func (c *Client) stream(body func(*Writer) error) error {
	framed := NewFramedWriter(c.Writer)
	w := NewWriter(framed)
	if err := body(w); err != nil {
		return err
	}
	if err := w.Flush(); err != nil {
		return err
	}
	return framed.Close()
}

// Wait reads the server's messages up to the last one of an operation.
func (c *Client) Wait() error {
	for {
		m, err := ReadLog(c.Reader, c.Version)
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return err
		}
		switch m := m.(type) {
		case *LogLast:
			return nil
		case *LogError:
			return m
		}
		c.log(m)
	}
}

// A ServeClient speaks the serve protocol from the client's side, one command
// after the other.
type ServeClient struct {
	Reader  *Reader // stands behind the last answer; a NAR after it is read here
	Writer  *Writer
	Version Version // what both sides speak
}

// NewServeClient opens the protocol over conn.
func NewServeClient(conn io.ReadWriter, mine Version) (*ServeClient, error) {
	c := &ServeClient{Reader: NewReader(conn), Writer: NewWriter(conn)}
	var err error
	c.Version, err = ServeClientHandshake(c.Reader, c.Writer, mine)
	if err != nil {
		return nil, err
	}
	return c, nil
}

// Do sends a command and returns its answer; see the request for its type. body
// writes the NAR or export stream that follows some of the commands, and is nil
// for all others. A server that fails just ends: io.ErrUnexpectedEOF.
func (c *ServeClient) Do(req ServeRequest, body func(*Writer) error) (Response, error) {
	if err := WriteServeRequest(c.Writer, c.Version, req); err != nil {
		return nil, err
	}
	if body != nil {
		if err := body(c.Writer); err != nil {
			return nil, fmt.Errorf("send the stream of %s: %w", req.Command(), err)
		}
	}
	if err := c.Writer.Flush(); err != nil {
		return nil, err
	}
	return ReadServeResponse(c.Reader, c.Version, req)
}
